//! The one rule a family: priority 1110, `not fwmark 0x10/0xf10 lookup 818`.
//!
//! Owns every rule at that priority that looks up our table; one that differs in anything else is damaged and replaced.
//! Rules of others, also at the same priority, stay.

use std::io;

use mesh_common::limits::{FWMARK, FWMARK_MASK, ROUTE_TABLE, RULE_PRIORITY};
use mesh_proto::device::Family;
use netlink_packet_route::route::{RouteHeader, RouteProtocol};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion};

use super::{accept, collect};

/// The rule stands and nothing damaged stands beside it.
pub(super) async fn present(handle: &Handle, family: Family) -> io::Result<bool> {
    let ours = ours(handle, family).await?;
    Ok(!ours.is_empty() && ours.iter().all(is_exact))
}

pub(super) async fn add(handle: &Handle, family: Family) -> io::Result<()> {
    let there = ours(handle, family).await?;
    if !there.is_empty() && there.iter().all(is_exact) {
        return Ok(());
    }
    // The kernel takes a rule that differs only in the inversion for the same one, at adding and at deleting: all of
    // them go before the right one comes.
    remove(handle, family).await?;
    let mut request =
        handle.rule().add().priority(RULE_PRIORITY).fw_mark(FWMARK).table_id(ROUTE_TABLE).action(RuleAction::ToTable);
    let message = request.message_mut();
    message.header.family = match family {
        Family::V4 => netlink_packet_route::AddressFamily::Inet,
        Family::V6 => netlink_packet_route::AddressFamily::Inet6,
    };
    message.header.table = RouteHeader::RT_TABLE_UNSPEC;
    message.header.flags |= RuleFlags::Invert;
    message.attributes.push(RuleAttribute::FwMask(FWMARK_MASK));
    message.attributes.push(RuleAttribute::Protocol(RouteProtocol::Kernel));
    accept(request.execute().await, &[libc::EEXIST])
}

/// Removes all that are ours, damaged ones too; the number removed is of no interest.
pub(super) async fn remove(handle: &Handle, family: Family) -> io::Result<()> {
    for rule in ours(handle, family).await? {
        accept(handle.rule().del(rule).execute().await, &[libc::ENOENT, libc::ESRCH])?;
    }
    Ok(())
}

pub(super) async fn ours(handle: &Handle, family: Family) -> io::Result<Vec<RuleMessage>> {
    let version = match family {
        Family::V4 => IpVersion::V4,
        Family::V6 => IpVersion::V6,
    };
    match collect(handle.rule().get(version).execute()).await {
        Ok(rules) => Ok(rules.into_iter().filter(is_ours).collect()),
        // A kernel without IPv6 has no such rules.
        Err(error)
            if family == Family::V6 && matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

fn is_ours(rule: &RuleMessage) -> bool {
    rule.attributes.contains(&RuleAttribute::Priority(RULE_PRIORITY))
        && rule.attributes.contains(&RuleAttribute::Table(ROUTE_TABLE))
}

fn is_exact(rule: &RuleMessage) -> bool {
    let selectors_known = rule.attributes.iter().all(|attribute| match attribute {
        RuleAttribute::Priority(_) | RuleAttribute::Table(_) => true,
        RuleAttribute::FwMark(mark) => *mark == FWMARK,
        RuleAttribute::FwMask(mask) => *mask == FWMARK_MASK,
        RuleAttribute::Protocol(protocol) => *protocol == RouteProtocol::Kernel,
        // The kernel's way to say "no suppression".
        RuleAttribute::SuppressPrefixLen(value) | RuleAttribute::SuppressIfGroup(value) => *value == u32::MAX,
        _ => false,
    });
    let complete = [
        RuleAttribute::FwMark(FWMARK),
        RuleAttribute::FwMask(FWMARK_MASK),
        RuleAttribute::Protocol(RouteProtocol::Kernel),
    ]
    .iter()
    .all(|attribute| rule.attributes.contains(attribute));
    selectors_known
        && complete
        && rule.header.action == RuleAction::ToTable
        && rule.header.flags.contains(RuleFlags::Invert)
        && rule.header.dst_len == 0
        && rule.header.src_len == 0
        && rule.header.tos == 0
}
