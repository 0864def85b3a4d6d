#!/usr/bin/env python3
"""A backend for StacyVM's provider `custom`: the published protocol (docs/custom-backend.md), in the standard library.

    BACKEND_KEY=secret python3 examples/custom-backend.py 7425        (Linux, as root, with util-linux)

A sandbox is a directory that becomes `/` in namespaces of its own, with the host's programs read-only. That is enough
to show the protocol. It is no wall against hostile code, it has no limits, and `image` is ignored.
"""
import glob, hmac, http.server, json, os, shutil, subprocess, sys, tempfile, time, urllib.parse, uuid

KEY, BOXES = os.environ.get("BACKEND_KEY", ""), {}  # BOXES: id -> (its directory, what holds its namespaces, pid inside)
HOLD = """for d in bin lib lib64 sbin usr etc; do
  if [ -L /$d ]; then cp -P /$d "$0/"; elif [ -d /$d ]; then mkdir "$0/$d"; mount --bind -o ro /$d "$0/$d"; fi; done
mount --rbind /dev "$0/dev"; mount -t proc proc "$0/proc"; echo "$1" > /proc/sys/kernel/hostname
exec chroot "$0" sh -c 'echo ready; exec cat'"""  # Until its input ends: with this program, however that ends.

class Backend(http.server.BaseHTTPRequestHandler):
    def handle_call(self):
        url, text = urllib.parse.urlsplit(self.path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not hmac.compare_digest(self.headers.get("X-API-Key", "").encode(), KEY.encode()): return self.answer(401)
        try:  # `POST /files/move` is `POST_files_move`, `GET /status/ID` is `GET_status` of ID.
            first, *rest = urllib.parse.unquote(url.path).strip("/").split("/")
            call = getattr(self, "_".join([self.command, first, *(rest if first == "files" else [])]))
            call(*rest if first != "files" else [], **dict(urllib.parse.parse_qsl(url.query)), **json.loads(text or b"{}"))
        except (AttributeError, KeyError, FileNotFoundError): self.answer(404)
        except OSError: self.answer(409)
        except (TypeError, ValueError): self.answer(400)
    do_GET = do_POST = do_DELETE = handle_call

    def answer(self, status, body=b""):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status), self.send_header("Content-Length", len(body)), self.end_headers(), self.wfile.write(body)

    def at(self, sandbox_id, path):  # Links must not lead out of the sandbox.
        root, path = BOXES[sandbox_id][0], BOXES[sandbox_id][0] + "/" + os.path.normpath("/" + path).lstrip("/")
        if not (os.path.realpath(path) + "/").startswith(root + "/"): raise FileNotFoundError
        return root, path

    def file(self, root, path):
        stat = os.lstat(path)
        return {"path": path[len(root):], "size": stat.st_size, "mode": f"{stat.st_mode & 0o7777:04o}",
                "is_dir": os.path.isdir(path), "mod_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(stat.st_mtime))}

    def GET_health(self): self.answer(200, {"status": "ok"})
    def GET_status(self, box): self.answer(200, {"id": box, "state": "running"} if BOXES[box] else None)
    def POST_spawn(self, image, **_):
        root, box = os.path.realpath(tempfile.mkdtemp(prefix="stacyvm-backend-")), f"box-{uuid.uuid4().hex}"
        for name in ("workspace", "tmp", "dev", "proc"): os.mkdir(f"{root}/{name}")
        holder = subprocess.Popen(["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "sh", "-c",
                                   HOLD, root, box], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if holder.stdout.readline() != b"ready\n": raise OSError
        BOXES[box] = (root, holder, open(f"/proc/{holder.pid}/task/{holder.pid}/children").read().strip())
        self.answer(201, {"id": box})
    def DELETE_sandboxes(self, box):
        root, holder, _ = BOXES.pop(box)
        holder.kill(), holder.wait(), shutil.rmtree(root, ignore_errors=True), self.answer(204)

    def POST_exec(self, sandbox_id, command, args=(), mode="shell", env={}, workdir="/workspace", stream=False, **_):
        if not command.strip(): raise ValueError
        quoted = [command, *("'" + arg.replace("'", "'\"'\"'") + "'" for arg in args)]
        argv = [command, *args] if mode == "argv" else ["sh", "-c", " ".join(quoted)]
        enter = ["nsenter", "--mount", "--pid", "--uts", "--ipc", "--root", "--target", BOXES[sandbox_id][2]]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:  # A pipe would wait for background children.
            env = {"PATH": os.defpath + ":/usr/sbin:/sbin", "HOME": "/workspace", **env}
            code = subprocess.run([*enter, f"--wdns={workdir}", "--", *argv], env=env, stdin=subprocess.DEVNULL, stdout=out,
                                  stderr=err).returncode
            out, err = (it.seek(0) or it.read().decode(errors="replace") for it in (out, err))
        lines = [{"stream": name, "data": data} for name, data in (("stdout", out), ("stderr", err)) if data]
        if stream: return self.answer(200, "\n".join(map(json.dumps, lines)).encode())
        self.answer(200, {"exit_code": 128 - code if code < 0 else code, "stdout": out, "stderr": err})

    def GET_files(self, sandbox_id, path): self.answer(200, open(self.at(sandbox_id, path)[1], "rb").read())
    def GET_files_stat(self, sandbox_id, path): self.answer(200, self.file(*self.at(sandbox_id, path)))
    def GET_files_list(self, sandbox_id, path):
        root, path = self.at(sandbox_id, path)
        self.answer(200, [self.file(root, f"{path}/{name}") for name in sorted(os.listdir(path))])
    def GET_files_glob(self, sandbox_id, pattern):
        root, path = BOXES[sandbox_id][0], os.path.normpath("/" + pattern).lstrip("/")
        self.answer(200, sorted("/" + name for name in glob.glob(path, root_dir=root, recursive=True)))
    def POST_files(self, sandbox_id, path, content, mode="0644"):
        _, path = self.at(sandbox_id, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file: file.write(content.encode())
        os.chmod(path, int(mode, 8)), self.answer(204)
    def DELETE_files(self, sandbox_id, path, recursive=False):
        _, path = self.at(sandbox_id, path)
        (shutil.rmtree if recursive else os.rmdir)(path) if os.path.isdir(path) else os.remove(path)
        self.answer(204)
    def POST_files_move(self, sandbox_id, old_path, new_path):
        old, new = self.at(sandbox_id, old_path)[1], self.at(sandbox_id, new_path)[1]
        os.lstat(old), os.makedirs(os.path.dirname(new), exist_ok=True), os.rename(old, new), self.answer(204)
    def POST_files_chmod(self, sandbox_id, path, mode): os.chmod(self.at(sandbox_id, path)[1], int(mode, 8)), self.answer(204)
    def log_message(self, *_): pass

class Server(http.server.ThreadingHTTPServer):
    request_queue_size, daemon_threads = 128, True
    def handle_error(self, *call): isinstance(sys.exc_info()[1], ConnectionError) or super().handle_error(*call)  # It hung up.

if __name__ == "__main__":
    server = Server(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 7425), Backend)
    print(f"listening on http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
