//! The same runtime without root: all that root's does, and what differs.

use stacyvm_api::{FindingLevel, Limit, NetworkMode, SandboxId};
use stacyvm_sandbox::{Provider, ProviderError, StartRequest};

use crate::fixture::{Fixture, spec};
use crate::ordinary_user::{self, Circumstances, Spoilt, as_ordinary_user};

/// Modules of this program that hold for every user, and how many tests they
/// have at least.
const FOR_EVERYBODY: [&str; 3] = ["oci_lifecycle::", "oci_restart::", "oci_conformance::"];
const AT_LEAST: usize = 14;

#[test]
fn life_restarts_and_the_contract_hold_with_subordinate_ids() {
    let passed = ordinary_user::run(&FOR_EVERYBODY, Circumstances::WITH_IDS);
    assert!(passed >= AT_LEAST, "only {passed} tests ran");
}

#[test]
fn life_restarts_and_the_contract_hold_with_one_uid() {
    let passed = ordinary_user::run(&FOR_EVERYBODY, Circumstances::ALONE);
    assert!(passed >= AT_LEAST, "only {passed} tests ran");
}

#[test]
fn delegated_control_groups_hold_limits() {
    // Its checks of limits are no mere notes here.
    let filter = ["oci_lifecycle::", "oci_conformance::the_host_image"];
    let passed = ordinary_user::run(&filter, Circumstances { cgroups: true, ..Circumstances::WITH_IDS });
    assert!(passed >= 9, "only {passed} tests ran");
}

#[test]
fn limits_are_refused_only_when_asked_for() {
    let test = "oci_rootless::limits_are_refused_only_when_asked_for";
    as_ordinary_user(test, Circumstances::ALONE, async || {
        let fixture = Fixture::start().await;
        let id = SandboxId::random();
        let created = fixture.provider.create(&id, &spec(), &()).await.expect("nothing was asked for");
        assert_eq!(created.limits.enforced, []);
        let all = [Limit::Memory, Limit::Swap, Limit::Cpu, Limit::Pids, Limit::Disk];
        assert_eq!(created.limits.unenforced, all);

        let mut wanted = spec();
        wanted.requested = [Limit::Memory, Limit::Pids].into();
        let refused = fixture.provider.create(&SandboxId::random(), &wanted, &()).await;
        let Err(ProviderError::LimitUnsupported { message, hint }) = &refused else { panic!("{refused:?}") };
        assert_eq!(message, "this host cannot enforce the limit on memory and swap and pids");
        assert!(hint.contains("allow_unenforced"), "{hint}");
        wanted.allow_unenforced = true;
        let allowed = fixture.create(&wanted).await;

        wanted.network.mode = NetworkMode::Bridge;
        let refused = fixture.provider.create(&SandboxId::random(), &wanted, &()).await;
        assert!(
            matches!(&refused, Err(ProviderError::InvalidSpec { message }) if message.contains("root")),
            "{refused:?}"
        );
        for id in [id, allowed] {
            fixture.provider.destroy(&id).await.expect("destroyed");
        }
        fixture.finish().await;
    });
}

#[test]
fn root_inside_is_the_user_outside_and_has_no_more_rights() {
    let test = "oci_rootless::root_inside_is_the_user_outside_and_has_no_more_rights";
    as_ordinary_user(test, Circumstances::WITH_IDS, async || {
        let home = std::env::var("HOME").expect("a home");
        let secret = std::path::Path::new(&home).join("secret");
        std::fs::write(&secret, "mine").expect("written");
        let fixture = Fixture::start().await;
        let id = fixture.create(&spec()).await;
        let inside = async |script: &str| fixture.output(&id, script).await;
        let own = rustix::process::geteuid().as_raw();
        assert_eq!(host_uid_of_init(&fixture, &id), own);

        let status = inside("grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -s '\\t' ' '").await;
        assert_eq!(status, "CapEff: 00000000a80405fb\nCapBnd: 00000000a80405fb\nNoNewPrivs: 1\nSeccomp: 2");
        let refused = "for c in 'mount -t tmpfs x /mnt' 'umount /proc' 'unshare -m true' 'chroot / umount /dev/shm' \
                       'mknod /tmp/sda b 8 0' 'hostname other'; do $c 2>/dev/null && echo \"$c\"; done; true";
        assert_eq!(inside(refused).await, "");
        assert_eq!(inside("cat /proc/net/dev | wc -l").await, "3", "loopback alone");
        let devices = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero";
        assert_eq!(inside("echo x >/dev/null; echo $(ls /dev)").await, devices);
        assert_eq!(
            inside("cat /proc/kcore /proc/timer_list 2>/dev/null | wc -c; cat /proc/1/environ | wc -c").await,
            "0\n0"
        );
        assert_eq!(inside(&format!("ls -d {home} 2>/dev/null || echo hidden")).await, "hidden");
        fixture.provider.destroy(&id).await.expect("destroyed");
        assert_eq!(std::fs::read_to_string(secret).expect("still there"), "mine");
        fixture.finish().await;
    });
}

#[test]
fn files_of_other_users_are_kept_apart_and_removed() {
    let test = "oci_rootless::files_of_other_users_are_kept_apart_and_removed";
    as_ordinary_user(test, Circumstances::WITH_IDS, async || {
        let fixture = Fixture::start().await;
        let mut wanted = spec();
        wanted.user = Some("user".into());
        let id = fixture.create(&wanted).await;
        assert_eq!(
            fixture.output(&id, "id -un; touch ~/mine && stat -c %U ~/mine /workspace").await,
            "user\nuser\nuser"
        );
        let script = "mkdir -p deep/er && chmod 0 deep/er && chmod 0 deep; cat /var/lib/no 2>&1 | wc -l; \
                      chown root ~/mine 2>/dev/null || echo refused";
        assert_eq!(fixture.output(&id, script).await, "1\nrefused");
        let as_root = StartRequest {
            argv: ["/bin/sh", "-c", "touch /r; chown 65534:65534 /r; chmod 4755 /r; stat -c %u:%a /r"]
                .map(str::to_owned)
                .into(),
            user: Some("root".into()),
            ..StartRequest::default()
        };
        assert_eq!(fixture.run(&id, as_root).await.stdout, "65534:4755\n");
        fixture.provider.destroy(&id).await.expect("destroyed");
        // Looks into the trash, too: nothing of it stays on disk.
        fixture.finish().await;
    });
}

#[test]
fn with_one_uid_other_users_are_refused_with_a_reason() {
    let test = "oci_rootless::with_one_uid_other_users_are_refused_with_a_reason";
    as_ordinary_user(test, Circumstances::ALONE, async || {
        let fixture = Fixture::start().await;
        let mut wanted = spec();
        wanted.user = Some("user".into());
        let refused = fixture.provider.create(&SandboxId::random(), &wanted, &()).await;
        let Err(ProviderError::InvalidSpec { message }) = &refused else { panic!("{refused:?}") };
        assert!(message.contains("1 uids") && message.contains("1000:1000"), "{message}");

        let id = fixture.create(&spec()).await;
        assert_eq!(fixture.output(&id, "cat /proc/self/uid_map | tr -s ' '").await, " 0 0 1");
        assert_eq!(fixture.output(&id, "mkdir d && touch d/f && chmod 0 d; echo done").await, "done");
        let report = fixture.provider.check().await;
        assert!(report.is_healthy(), "{report:?}");
        let users = report.findings.iter().find(|finding| finding.name == "oci.users").expect("said");
        assert_eq!(users.level, FindingLevel::Warning);
        assert!(users.message.contains("/etc/subuid"), "{users:?}");
        assert!(users.fix.as_ref().is_some_and(|fix| fix.contains("uidmap")), "{users:?}");
        fixture.provider.destroy(&id).await.expect("destroyed");
        fixture.finish().await;
    });
}

#[test]
fn a_forbidding_kernel_setting_is_named() {
    let test = "oci_rootless::a_forbidding_kernel_setting_is_named";
    let circumstances = Circumstances { spoilt: Spoilt::Namespaces, ..Circumstances::ALONE };
    as_ordinary_user(test, circumstances, async || {
        expect_obstacle("user.max_user_namespaces is 0", "sysctl -w user.max_user_namespaces=").await;
    });
}

#[test]
fn a_masked_proc_is_named() {
    let test = "oci_rootless::a_masked_proc_is_named";
    let circumstances = Circumstances { spoilt: Spoilt::Proc, ..Circumstances::ALONE };
    as_ordinary_user(test, circumstances, async || {
        expect_obstacle("no proc file system of our own", "systempaths=unconfined").await;
    });
}

/// Health and a failed creation say the same, and nothing is left of it.
async fn expect_obstacle(message: &str, fix: &str) {
    let fixture = Fixture::start().await;
    let report = fixture.provider.check().await;
    let failure = report.findings.iter().find(|finding| finding.level == FindingLevel::Failure).expect("a failure");
    assert_eq!(failure.name, "oci.namespaces");
    assert!(failure.message.contains(message), "{failure:?}");
    assert!(failure.fix.as_ref().is_some_and(|text| text.contains(fix)), "{failure:?}");
    let refused = fixture.provider.create(&SandboxId::random(), &spec(), &()).await;
    let Err(ProviderError::Unavailable { message: said, hint, .. }) = &refused else { panic!("{refused:?}") };
    assert!(said.contains(message) && hint.as_ref().is_some_and(|hint| hint.contains(fix)), "{said} {hint:?}");
    fixture.finish().await;
}

fn host_uid_of_init(fixture: &Fixture, id: &SandboxId) -> u32 {
    let record = std::fs::read(fixture.oci_dir().join("sandboxes").join(id.as_str()).join("init.json"));
    let identity: serde_json::Value = serde_json::from_slice(&record.expect("readable")).expect("JSON");
    let status = std::fs::read_to_string(format!("/proc/{}/status", identity["pid"])).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("a uid");
    line.split_whitespace().next().expect("a number").parse().expect("a number")
}
