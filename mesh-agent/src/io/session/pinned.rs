//! TLS towards a server that is known by its public key.
//!
//! The pin replaces certificate authorities, names and dates; the proof that the server holds the key, its handshake
//! signature, is checked as always. TLS 1.3 only, no resumption, no 0-RTT: every connection proves the key anew.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, PeerIncompatible, SignatureScheme};
use sha2::{Digest as _, Sha256};

use super::Failure;

/// What one attempt trusts, and what it met instead.
#[derive(Debug)]
pub(super) struct Pinned {
    pin: [u8; 32],
    provider: Arc<CryptoProvider>,
    wrong: Mutex<Option<[u8; 32]>>,
}

impl Pinned {
    pub(super) fn new(pin: [u8; 32]) -> Arc<Self> {
        Arc::new(Self { pin, provider: Arc::new(rustls::crypto::ring::default_provider()), wrong: Mutex::new(None) })
    }

    pub(super) fn config(self: &Arc<Self>, alpn: &[u8]) -> ClientConfig {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider has TLS 1.3 suites")
            .dangerous()
            .with_custom_certificate_verifier(self.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = Resumption::disabled();
        config
    }

    /// The failure to report: the wrong key if there was one, else what the caller saw.
    pub(super) fn or(&self, seen: Failure) -> Failure {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).map_or(seen, Failure::WrongPin)
    }
}

/// The name sent to the server: of use to proxies, never checked.
pub(super) fn sni(host: &str) -> ServerName<'static> {
    ServerName::try_from(host.to_owned())
        .or_else(|_| ServerName::try_from("meshspan-discovery"))
        .expect("a plain name is a valid name")
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let found: [u8; 32] = Sha256::digest(certificate.subject_public_key_info().as_ref()).into();
        if found == self.pin {
            return Ok(ServerCertVerified::assertion());
        }
        *self.wrong.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
