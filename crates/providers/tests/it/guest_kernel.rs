//! A kernel of the test's own, for what the host's kernel was built without.
//!
//! User-mode Linux runs a whole kernel as an ordinary process, with the host's
//! files read-only as its root. The test starts there once more, by its name.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Set for the test inside.
const MARK: &str = "STACYVM_TEST_IN_GUEST_KERNEL";

/// How long it may take on a loaded machine; a few seconds otherwise.
const PATIENCE: Duration = Duration::from_mins(5);

const KERNEL: &str = "/usr/bin/linux.uml";
const MODULES: &str = "/usr/lib/uml/modules";

/// In the order in which they need each other.
const NEEDED_MODULES: [&str; 4] =
    ["fs/quota/quota_tree", "fs/quota/quota_v2", "fs/overlayfs/overlay", "drivers/block/loop"];

/// What its init prints last if the test passed.
const PASSED: &str = "guest kernel: the test passed";

pub(crate) fn is_inside() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Runs one test of this program in it and fails as that does.
pub(crate) fn run(test: &str) {
    assert!(Path::new(KERNEL).exists(), "this test needs {KERNEL}: install user-mode-linux");
    let directory = tempfile::tempdir().expect("a directory");
    let init = directory.path().join("init");
    write_program(&init, &init_script(test));
    let console = directory.path().join("console");
    let output = std::fs::File::create(&console).expect("a file");
    let mut kernel = Command::new(KERNEL)
        .args(["mem=1G", "quiet", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"])
        .args(["con=null", "con0=null,fd:1", &format!("init={}", init.display())])
        .arg(format!("uml_dir={}", directory.path().display()))
        .process_group(0)
        .stdin(Stdio::null())
        .stderr(output.try_clone().expect("a file"))
        .stdout(output)
        .spawn()
        .expect("the kernel starts");
    let deadline = Instant::now() + PATIENCE;
    while kernel.try_wait().expect("it can be waited for").is_none() {
        if Instant::now() > deadline {
            // Its processes are processes of the host.
            let group = rustix::process::Pid::from_child(&kernel);
            rustix::process::kill_process_group(group, rustix::process::Signal::KILL).expect("killed");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let said = String::from_utf8_lossy(&std::fs::read(&console).expect("readable")).into_owned();
    assert!(said.contains(PASSED), "{test} in a kernel of its own:\n{said}");
}

fn init_script(test: &str) -> String {
    let kernels = std::fs::read_dir(MODULES).expect("the kernel's modules").flatten();
    let modules = kernels.map(|entry| entry.path().join("kernel")).next().expect("modules of one kernel");
    let program = std::env::current_exe().expect("a path");
    let mut lines = vec![
        "#!/bin/sh".to_owned(),
        "export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run TMPDIR=/run".to_owned(),
        "mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /run".to_owned(),
        "mount -t cgroup2 cgroup2 /sys/fs/cgroup && ip link set lo up".to_owned(),
    ];
    lines.extend(NEEDED_MODULES.map(|module| format!("busybox insmod {}/{module}.ko", modules.display())));
    lines.push(format!("{MARK}=1 {} --exact {test} --nocapture && echo '{PASSED}'", program.display()));
    lines.push("poweroff -f\n".to_owned());
    lines.join("\n")
}

fn write_program(path: &Path, text: &str) {
    let mut file = std::fs::File::options().create_new(true).write(true).mode(0o700).open(path).expect("a file");
    file.write_all(text.as_bytes()).expect("written");
}
