//! Limits that a watcher holds, where there are no control groups.

use stacyvm_api::Limit;
use stacyvm_sandbox::{Provider as _, ProviderError, SandboxSpec};

use crate::fixture::eventually;
use crate::ordinary_user::{Circumstances, as_ordinary_user};
use crate::proot_fixture::{Apart, Proot, argv, debian_root, traced_by};

#[test]
fn a_watcher_holds_memory_and_files() {
    const NAME: &str = "proot_limits::a_watcher_holds_memory_and_files";
    as_ordinary_user(NAME, Circumstances::ALONE, async || {
        let fixture = Proot::start(Apart::Shared).await;
        let mut spec = SandboxSpec { memory_mib: 48, requested: [Limit::Memory, Limit::Disk].into(), ..fixture.spec() };
        spec.disk.size_mib = Some(24);
        let id = fixture.create(&spec).await;
        let ran = fixture.sh(&id, "tail /dev/zero").await;
        assert_ne!(ran.exit.code, Some(0), "{ran:?}");
        assert_eq!(fixture.output(&id, "echo alive").await, "alive");
        let usage = fixture.provider.usage(&id).await.expect("a reading");
        assert_eq!((usage.disk_kills, usage.pids_kills), (0, 0));
        assert!(usage.oom_kills >= 1 && usage.memory_limit_bytes == 48 << 20, "{usage:?}");
        // One file is bounded at once, many of them a little later.
        let ran = fixture
            .sh(&id, "dd if=/dev/zero of=/workspace/big bs=1M count=60; ls -l /workspace/big; rm /workspace/big")
            .await;
        assert!(ran.stdout.contains(&(24 << 20).to_string()), "{ran:?}");
        let fill = "i=0; while true; do dd if=/dev/zero of=/workspace/f$i bs=1M count=4 2>/dev/null; sleep 0.3; i=$((i+1)); done";
        let ran = fixture.sh(&id, fill).await;
        assert!(ran.exit.signal.is_some() || ran.exit.code != Some(0), "{ran:?}");
        // Whoever saw the end finds the reason counted.
        assert_eq!(fixture.provider.usage(&id).await.expect("a reading").disk_kills, 1);
        assert_eq!(fixture.output(&id, "rm -f /workspace/f*; echo cleaned").await, "cleaned");
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    });
}

/// It forks faster than PRoot sees to what is killed.
#[test]
fn a_fork_bomb_is_killed_and_its_sandbox_goes_on() {
    const NAME: &str = "proot_limits::a_fork_bomb_is_killed_and_its_sandbox_goes_on";
    as_ordinary_user(NAME, Circumstances::ALONE, async || {
        let fixture = Proot::start(Apart::Shared).await;
        let spec = SandboxSpec { memory_mib: 64, pids_limit: 1024, ..fixture.spec() };
        let id = fixture.create(&spec).await;
        let proot = fixture.pid(&id);
        let ran = fixture.sh(&id, "f(){ f|f& }; f; sleep 600").await;
        assert!(ran.exit.signal.is_some() || ran.exit.code != Some(0), "{ran:?}");
        eventually("only the agent is left", async || traced_by(proot).len() == 1).await;
        assert_eq!(fixture.output(&id, "echo alive").await, "alive");
        let usage = fixture.provider.usage(&id).await.expect("a reading");
        assert!(usage.oom_kills + usage.pids_kills > 0, "{usage:?}");
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    });
}

/// Ways of taking more of the disk than a look at the tree shows.
#[test]
fn hidden_files_count_and_are_removed_on_debian() {
    const NAME: &str = "proot_limits::hidden_files_count_and_are_removed_on_debian";
    as_ordinary_user(NAME, Circumstances::ALONE, async || {
        let fixture = Proot::with(Apart::Shared, |options| options.rootfs = debian_root()).await;
        let mut spec = SandboxSpec { requested: [Limit::Disk].into(), ..fixture.spec() };
        spec.disk.size_mib = Some(16);
        let refused = fixture.provider.create(&stacyvm_api::SandboxId::random(), &spec, &()).await;
        let Err(ProviderError::InvalidSpec { message }) = refused else { panic!("{refused:?}") };
        assert!(message.contains("disk of 16 MiB"), "{message}");

        spec.disk.size_mib = Some(600);
        let id = fixture.create(&spec).await;
        // PRoot keeps directories open to their owner, but not by this call.
        let close = "mkdir '/workspace/closed'; mkdir '/workspace/closed/inner'; \
                     open my $f, '>', '/workspace/closed/inner/file'; close $f; \
                     for my $at ('/workspace/closed/inner', '/workspace/closed') \
                     { my $d = syscall(2, $at, 0200000); syscall(91, $d, 0300) == 0 or die } sleep 600";
        let ran = fixture.run(&id, argv(&["perl", "-e", close])).await;
        assert!(ran.exit.signal.is_some() || ran.exit.code != Some(0), "it went on: {ran:?}");
        fixture.provider.destroy(&id).await.expect("destroyed");

        let id = fixture.create(&spec).await;
        let unlink = "for my $i (1 .. 3) { open $f[$i], '>', '/workspace/f'; unlink '/workspace/f'; \
                      print { $f[$i] } 'x' x 200_000_000; $f[$i]->flush } sleep 600";
        let ran = fixture.run(&id, argv(&["perl", "-MIO::Handle", "-e", unlink])).await;
        assert!(ran.exit.signal.is_some() || ran.exit.code != Some(0), "it went on: {ran:?}");
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    });
}

#[test]
fn the_bounds_of_the_operator_are_told() {
    const NAME: &str = "proot_limits::the_bounds_of_the_operator_are_told";
    as_ordinary_user(NAME, Circumstances::ALONE, async || {
        let bounds = |options: &mut stacyvm_providers::proot::ProotOptions| {
            (options.max_memory_mib, options.max_disk_mib) = (96, 64);
        };
        let fixture = Proot::with(Apart::Shared, bounds).await;
        // A default above the bound, and a disk that nobody asked for.
        let id = stacyvm_api::SandboxId::random();
        let created = fixture.provider.create(&id, &fixture.spec(), &()).await.expect("a sandbox");
        let limits = created.limits;
        assert_eq!((limits.memory_mb, limits.disk_size_mb), (Some(96), Some(64)), "{limits:?}");
        assert!([Limit::Memory, Limit::Disk].iter().all(|limit| limits.enforced.contains(limit)), "{limits:?}");
        assert!(limits.unenforced.contains(&Limit::Pids), "{limits:?}");
        let usage = fixture.provider.usage(&id).await.expect("a reading");
        assert_eq!((usage.memory_limit_bytes, usage.disk_limit_bytes), (96 << 20, 64 << 20));
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    });
}

#[test]
fn what_nobody_holds_is_refused() {
    const NAME: &str = "proot_limits::what_nobody_holds_is_refused";
    as_ordinary_user(NAME, Circumstances::ALONE, async || {
        let fixture = Proot::start(Apart::Shared).await;
        let spec = SandboxSpec { vcpus: 0.5, requested: [Limit::Cpu, Limit::Pids].into(), ..fixture.spec() };
        let refused = fixture.provider.create(&stacyvm_api::SandboxId::random(), &spec, &()).await;
        let Err(ProviderError::LimitUnsupported { message, hint }) = refused else { panic!("{refused:?}") };
        assert!(message.contains("cpu") && message.contains("pids") && hint.contains("allow_unenforced"), "{message}");
        let accepted = SandboxSpec { allow_unenforced: true, ..spec };
        let id = stacyvm_api::SandboxId::random();
        let created = fixture.provider.create(&id, &accepted, &()).await.expect("accepted");
        assert!(created.limits.unenforced.contains(&Limit::Cpu) && created.limits.enforced.contains(&Limit::Memory));
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    });
}
