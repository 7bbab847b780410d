//! Settings that change while the mesh runs, as others notice it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::Duration;

use mesh_sim::calm::{Calm, plan};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_node_that_is_denied_no_longer_comes_back_without_a_word_of_its_own() {
    let mut mesh = Calm::new(vec![plan(1, &[]), plan(2, &[]), plan(3, &[])]);
    for host in 0..3 {
        mesh.start(host);
    }
    mesh.run_for(SECOND * 5);
    let [_, denied, other] = [0, 1, 2].map(|host| mesh.hosts[host].node());
    let puts = mesh.puts(1);
    let known = |mesh: &Calm| -> BTreeSet<_> { mesh.view(0).peers.iter().filter_map(|peer| peer.node).collect() };
    assert_eq!(known(&mesh), BTreeSet::from([denied, other]));

    mesh.change_settings(0, |settings| settings.deny_nodes = BTreeSet::from([denied]));
    mesh.run_for(SECOND * 60);
    assert_eq!(known(&mesh), BTreeSet::from([other]));
    // Another one is denied in the same moment.
    mesh.change_settings(0, |settings| settings.deny_nodes = BTreeSet::from([other]));
    mesh.run_for(SECOND * 2);
    assert_eq!(known(&mesh), BTreeSet::from([denied]));
    mesh.change_settings(0, |settings| settings.deny_nodes.clear());
    mesh.run_for(SECOND * 2);
    assert_eq!(known(&mesh), BTreeSet::from([denied, other]));
    assert_eq!(mesh.puts(1), puts, "it had nothing to say meanwhile");
}
