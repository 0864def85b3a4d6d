import ctypes, fcntl, os, select, socket, tempfile
libc = ctypes.CDLL(None, use_errno=True)
machine = os.uname().machine
# Numbers differ for calls that are older than the common table.
number = lambda x86, arm: x86 if machine == "x86_64" else arm

def call(nr, *args):
    ctypes.set_errno(0)
    result = libc.syscall(nr, *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def io_uring():
    os.close(call(425, 1, ctypes.create_string_buffer(256)))

def ptrace():
    child = os.fork()
    if child == 0:
        os._exit(0 if libc.ptrace(0, 0, None, None) == 0 else 1)
    if os.waitpid(child, 0)[1]:
        raise OSError(1, "PTRACE_TRACEME was refused")

def perf_event_open():
    attributes = ctypes.create_string_buffer(128)
    ctypes.memmove(attributes, (1).to_bytes(4, "little") + (128).to_bytes(4, "little"), 8)
    os.close(call(number(298, 241), attributes, 0, -1, -1, 0))

def fanotify():
    os.close(call(number(300, 262), 0, 0))

def raw_socket():
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()

def overlay_mount():
    with tempfile.TemporaryDirectory() as base:
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"{base}/{name}")
        options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work".encode()
        if libc.mount(b"overlay", f"{base}/merged".encode(), b"overlay", 0, options):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        libc.umount(f"{base}/merged".encode())

def proc_details():
    for name in ("status", "maps", "smaps", "mountinfo", "cgroup"):
        open(f"/proc/self/{name}").read()

def inotify():
    with tempfile.TemporaryDirectory() as base:
        watch = call(number(294, 26), 0)
        if libc.inotify_add_watch(watch, base.encode(), 0x100) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")
        open(f"{base}/file", "w").close()
        ready, _, _ = select.select([watch], [], [], 5)
        os.close(watch)
        if not ready:
            raise OSError(110, "no event came")

def flock():
    with tempfile.TemporaryFile() as one:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)

def epoll():
    read, write = os.pipe()
    poll = select.epoll()
    poll.register(read, select.EPOLLIN)
    os.write(write, b"x")
    if not poll.poll(5):
        raise OSError(110, "no event came")

for probe in (io_uring, ptrace, perf_event_open, fanotify, raw_socket, overlay_mount, proc_details, inotify, flock, epoll):
    try:
        probe()
        print(f"{probe.__name__}: supported")
    except Exception as error:
        print(f"{probe.__name__}: unsupported, {error}")
