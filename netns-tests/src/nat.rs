//! NAT routers in the lab's vocabulary (RFC 4787): what kinds there are, how a site is made of them, and what a pair of
//! sites must be able to do.
//!
//! [`rules`] turns a router into packet filter rules, [`world`] puts routers between hosts, [`classify`] finds out from
//! behind a router, by packets alone, what it really is, and [`oracle`] says which pairs must connect directly. None of
//! it shares a line with the programs under test.

pub mod classify;
pub mod oracle;
pub mod rules;
pub mod world;

use std::{fmt, str::FromStr};

use anyhow::{Result, bail};

/// Whether one inner socket has one outer address for all destinations. Later is stricter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mapping {
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

/// From whom an outer address accepts packets. Later is stricter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Filtering {
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

/// One router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Router {
    EimEif,
    EimAdf,
    EimApdf,
    EdmApdf,
    /// EIM and APDF for what it lets out: TCP to 443 and 7443.
    UdpBlocked,
}

impl Router {
    pub fn mapping(self) -> Mapping {
        match self {
            Self::EdmApdf => Mapping::AddressAndPortDependent,
            Self::EimEif | Self::EimAdf | Self::EimApdf | Self::UdpBlocked => Mapping::EndpointIndependent,
        }
    }

    pub fn filtering(self) -> Filtering {
        match self {
            Self::EimEif => Filtering::EndpointIndependent,
            Self::EimAdf => Filtering::AddressDependent,
            Self::EimApdf | Self::EdmApdf | Self::UdpBlocked => Filtering::AddressAndPortDependent,
        }
    }
}

/// Which outer port a mapping gets, where the kind leaves a choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ports {
    /// The inner one where it is free.
    #[default]
    Kept,
    /// Another one.
    Shifted,
}

/// How a site is connected: with public addresses, behind one router, or behind a home's and a carrier's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Open,
    EimEif,
    EimAdf,
    EimApdf,
    EdmApdf,
    UdpBlocked,
    CgnatEimEif,
    CgnatEimApdf,
    CgnatEdmApdf,
}

impl Kind {
    pub const ALL: [Self; 9] = [
        Self::Open,
        Self::EimEif,
        Self::EimAdf,
        Self::EimApdf,
        Self::EdmApdf,
        Self::UdpBlocked,
        Self::CgnatEimEif,
        Self::CgnatEimApdf,
        Self::CgnatEdmApdf,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::EimEif => "eim-eif",
            Self::EimAdf => "eim-adf",
            Self::EimApdf => "eim-apdf",
            Self::EdmApdf => "edm-apdf",
            Self::UdpBlocked => "udp-blocked",
            Self::CgnatEimEif => "cgnat-eim-eif",
            Self::CgnatEimApdf => "cgnat-eim-apdf",
            Self::CgnatEdmApdf => "cgnat-edm-apdf",
        }
    }

    /// The routers between a host and the internet, the home's first.
    pub fn routers(self) -> &'static [Router] {
        match self {
            Self::Open => &[],
            Self::EimEif => &[Router::EimEif],
            Self::EimAdf => &[Router::EimAdf],
            Self::EimApdf => &[Router::EimApdf],
            Self::EdmApdf => &[Router::EdmApdf],
            Self::UdpBlocked => &[Router::UdpBlocked],
            Self::CgnatEimEif => &[Router::EimApdf, Router::EimEif],
            Self::CgnatEimApdf => &[Router::EimApdf, Router::EimApdf],
            Self::CgnatEdmApdf => &[Router::EimApdf, Router::EdmApdf],
        }
    }

    pub fn has_carrier(self) -> bool {
        self.routers().len() > 1
    }

    /// What the whole chain does: of each property the strictest.
    pub fn mapping(self) -> Mapping {
        self.routers().iter().map(|router| router.mapping()).max().unwrap_or(Mapping::EndpointIndependent)
    }

    pub fn filtering(self) -> Filtering {
        self.routers().iter().map(|router| router.filtering()).max().unwrap_or(Filtering::EndpointIndependent)
    }

    pub fn passes_udp(self) -> bool {
        !self.routers().contains(&Router::UdpBlocked)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let Some(kind) = Self::ALL.into_iter().find(|kind| kind.name() == name) else {
            bail!("there is no kind {name}; kinds are {}", Self::ALL.map(Self::name).join(" "));
        };
        Ok(kind)
    }
}
