#![allow(clippy::unwrap_used)]

use tempfile::TempDir;

use super::*;

fn opened() -> (TempDir, NodeId) {
    let dir = tempfile::tempdir().unwrap();
    let mut state = State::open(dir.path()).unwrap();
    state.reserve_seq(7).unwrap();
    state.reserve_seq(9).unwrap();
    let node = state.identity().node_id();
    (dir, node)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn everything_is_found_again_and_closed_to_others() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().join("a/b");
    let mut state = State::open(&state_dir).unwrap();
    let (node, wg) = (state.identity().node_id(), state.wg().public());
    let frames = vec![Bytes::from_static(b"one"), Bytes::new(), Bytes::from(vec![7; 4300])];
    let marks = BTreeMap::from([(NodeId([1; 32]), 5), (NodeId([2; 32]), u64::MAX)]);
    let claim = Some((Ipv4Addr::new(198, 19, 3, 4), 1_700_000_000_000));
    let since = BTreeMap::from([
        ("10.1.0.0/16".parse().unwrap(), 1_600_000_000_000),
        ("2001:db8::/32".parse().unwrap(), u64::MAX),
    ]);
    assert_eq!(state.announced(), (&BTreeMap::new(), 0));
    assert!(
        state.load_frames().unwrap().is_empty() && state.load_marks().unwrap().is_empty() && state.claim().is_none()
    );
    state.reserve_seq(42).unwrap();
    state.reserve_seq(41).unwrap();
    state.set_claim(claim).unwrap();
    state.set_announced(since.clone(), 1_700_000_000_001).unwrap();
    state.store_frames(&frames).unwrap();
    state.store_marks(&marks).unwrap();
    drop(state);

    let state = State::open(&state_dir).unwrap();
    assert_eq!((state.identity().node_id(), state.wg().public()), (node, wg));
    assert_eq!((state.reserved_seq(), state.claim()), (42, claim));
    assert_eq!(state.announced(), (&since, 1_700_000_000_001));
    assert_eq!((state.load_frames().unwrap(), state.load_marks().unwrap()), (frames, marks));
    assert_eq!(mode(&state_dir), 0o700);
    for entry in fs::read_dir(&state_dir).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        assert!(path.extension().is_none_or(|extension| extension != "tmp"), "{} is left over", path.display());
    }
}

#[test]
fn numbers_of_an_older_version_are_read_and_nothing_was_announced() {
    let (dir, _) = opened();
    let old = br#"{"reserved_seq":8,"overlay_v4":{"address":"198.19.3.4","claimed_at_ms":5}}"#;
    fs::write(dir.path().join(NUMBERS), old).unwrap();
    let mut state = State::open(dir.path()).unwrap();
    assert_eq!((state.reserved_seq(), state.claim()), (8, Some((Ipv4Addr::new(198, 19, 3, 4), 5))));
    assert_eq!(state.announced(), (&BTreeMap::new(), 0));
    // Each number outlives a change of the others.
    let since = BTreeMap::from([("10.1.0.0/16".parse().unwrap(), 3)]);
    state.set_announced(since.clone(), 9).unwrap();
    state.reserve_seq(10).unwrap();
    state.set_claim(None).unwrap();
    state.set_moved_port(51872, 23456).unwrap();
    drop(state);
    let state = State::open(dir.path()).unwrap();
    assert_eq!((state.reserved_seq(), state.claim(), state.announced()), (10, None, (&since, 9)));
    assert_eq!(
        (state.moved_port(51872), state.moved_port(51873)),
        (Some(23456), None),
        "another one is configured now"
    );
}

#[test]
fn a_second_agent_is_refused_by_name_until_the_first_ends() {
    let dir = tempfile::tempdir().unwrap();
    let first = State::open(dir.path()).unwrap();
    let error = State::open(dir.path()).unwrap_err().to_string();
    let (pid, shown) = (std::process::id(), dir.path().display());
    let expected =
        format!("another agent (process {pid}) uses the state directory {shown}: stop it, or give --state-dir");
    assert_eq!(error, expected);
    drop(first);
    State::open(dir.path()).unwrap();
}

#[test]
fn an_identity_cut_anywhere_is_an_error_and_never_made_anew() {
    let (dir, node) = opened();
    let file = dir.path().join(IDENTITY);
    let whole = fs::read(&file).unwrap();
    // The last byte is a line feed, which nothing depends on.
    for len in 0..whole.len() - 1 {
        fs::write(&file, &whole[..len]).unwrap();
        let error = State::open(dir.path()).unwrap_err();
        assert!(matches!(error, StateError::IdentityDamaged { .. }), "cut at {len}: {error}");
        assert_eq!(fs::read(&file).unwrap(), &whole[..len], "cut at {len}: the file was changed");
    }
    for at in 0..whole.len() - 1 {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        fs::write(&file, &flipped).unwrap();
        match State::open(dir.path()) {
            Ok(state) => assert_eq!(state.identity().node_id(), node, "flipped at {at}"),
            Err(error) => assert!(matches!(error, StateError::IdentityDamaged { .. }), "flipped at {at}: {error}"),
        }
    }
    durable::replace(&file, &whole, FILE_MODE).unwrap();
    assert_eq!(State::open(dir.path()).unwrap().identity().node_id(), node);
}

#[test]
fn a_lost_identity_is_an_error_while_anything_else_of_the_node_is_there() {
    let (dir, _) = opened();
    let file = dir.path().join(IDENTITY);
    fs::remove_file(&file).unwrap();
    let expected = format!(
        "{} is missing, but state.json beside it shows that this node had an identity: restore it from a backup, \
         or empty {} to join as a new node",
        file.display(),
        dir.path().display()
    );
    assert_eq!(State::open(dir.path()).unwrap_err().to_string(), expected);
    fs::remove_file(dir.path().join(NUMBERS)).unwrap();
    // The generation before tells the same.
    assert!(matches!(State::open(dir.path()), Err(StateError::IdentityMissing { .. })));
    assert!(!file.exists());
    fs::remove_file(dir.path().join("state.json.prev")).unwrap();
    State::open(dir.path()).unwrap();
}

#[test]
fn a_crash_while_the_identity_was_made_leaves_no_trouble() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(durable::temporary(&dir.path().join(IDENTITY)), b"{\"vers").unwrap();
    let node = State::open(dir.path()).unwrap().identity().node_id();
    assert_eq!(State::open(dir.path()).unwrap().identity().node_id(), node);
}

#[test]
fn an_identity_that_others_can_read_is_refused() {
    let (dir, _) = opened();
    let file = dir.path().join(IDENTITY);
    fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
    let expected =
        format!("{0} can be read by others (mode 640) and holds the keys of this node: chmod 600 {0}", file.display());
    assert_eq!(State::open(dir.path()).unwrap_err().to_string(), expected);
}

#[test]
fn a_file_of_another_owner_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED a_file_of_another_owner_is_refused: run the tests as root");
        assert!(std::env::var_os("MESHSPAN_STRICT").is_none(), "MESHSPAN_STRICT is set");
        return;
    }
    let (dir, _) = opened();
    for name in [IDENTITY, NUMBERS] {
        let file = dir.path().join(name);
        std::os::unix::fs::chown(&file, Some(12345), None).unwrap();
        let expected = format!(
            "{0} belongs to user 12345, this agent runs as user 0: chown 0 {0}, or run as the owner",
            file.display()
        );
        assert_eq!(State::open(dir.path()).unwrap_err().to_string(), expected);
        std::os::unix::fs::chown(&file, Some(0), None).unwrap();
    }
}

#[test]
fn damaged_numbers_marks_and_frames_fall_back_to_the_generation_before() {
    let (dir, node) = opened();
    let old = vec![Bytes::from_static(b"old")];
    {
        let state = State::open(dir.path()).unwrap();
        state.store_frames(&old).unwrap();
        state.store_frames(&[Bytes::from_static(b"new"), Bytes::from_static(b"newer")]).unwrap();
        state.store_marks(&BTreeMap::from([(node, 1)])).unwrap();
        state.store_marks(&BTreeMap::from([(node, 2)])).unwrap();
    }
    let [numbers, marks, frames] = [NUMBERS, MARKS, FRAMES].map(|name| dir.path().join(name));
    for (file, check) in [
        (&numbers, (|state| assert_eq!(state.reserved_seq(), 7)) as fn(&State)),
        (&marks, |state| assert_eq!(state.load_marks().unwrap().values().copied().collect::<Vec<_>>(), [1])),
        (&frames, |state| assert_eq!(state.load_frames().unwrap(), [Bytes::from_static(b"old")])),
    ] {
        let whole = fs::read(file).unwrap();
        for len in 0..whole.len() {
            fs::write(file, &whole[..len]).unwrap();
            let state = State::open(dir.path()).unwrap();
            assert_eq!(state.identity().node_id(), node);
            check(&state);
        }
        fs::remove_file(file).unwrap();
        check(&State::open(dir.path()).unwrap());
        fs::write(file, b"garbage").unwrap();
        fs::write(durable::previous(file), b"garbage").unwrap();
        let state = State::open(dir.path()).unwrap();
        assert_eq!(state.identity().node_id(), node);
        state.load_marks().unwrap();
        state.load_frames().unwrap();
    }
}

#[test]
fn a_write_that_fails_is_reported_and_changes_nothing() {
    let (dir, _) = opened();
    let mut state = State::open(dir.path()).unwrap();
    state.store_frames(&[Bytes::from_static(b"kept")]).unwrap();
    for name in [FRAMES, NUMBERS] {
        fs::create_dir(durable::temporary(&dir.path().join(name))).unwrap();
    }
    let error = state.store_frames(&[]).unwrap_err().to_string();
    assert!(error.contains("cache.bin cannot be written"), "{error}");
    state.reserve_seq(100).unwrap_err();
    assert_eq!(state.reserved_seq(), 9);
    assert_eq!(state.load_frames().unwrap(), [Bytes::from_static(b"kept")]);
}

#[test]
fn debug_shows_no_key() {
    let (dir, _) = opened();
    let state = State::open(dir.path()).unwrap();
    let shown = format!("{state:?}");
    assert!(!shown.contains(&data_encoding::BASE64.encode(&*state.identity().seed())), "{shown}");
    assert!(shown.contains("SignKey(hidden)"), "{shown}");
}
