"""A small site with everything that makes a proxy difficult: assets, a
WebSocket that echoes, server-sent events, uploads. Standard library only."""

import base64
import hashlib
import http.server
import json
import struct
import sys
import time

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Inside</title>
<link rel="stylesheet" href="/style.css"></head>
<body><h1>Inside a sandbox</h1>
<p><img id="image" src="/image.svg" alt="a square" width="48" height="48"></p>
<dl><dt>WebSocket</dt><dd id="socket">-</dd><dt>Events</dt><dd id="ticks">-</dd>
<dt>Upload</dt><dd id="upload">-</dd><dt>Headers</dt><dd><pre id="headers">-</pre></dd></dl>
<script src="/app.js"></script></body></html>
"""

RELATIVE = """<!doctype html><meta charset="utf-8"><title>Inside</title>
<link rel="stylesheet" href="style.css"><h1>By path</h1><img id="image" src="image.svg" alt="a square">
"""

STYLE = """body { font: 16px/1.5 sans-serif; margin: 2rem; color: rgb(10, 20, 30) }
h1 { color: rgb(0, 102, 51) } dt { font-weight: bold }
"""

IMAGE = """<svg xmlns="http://www.w3.org/2000/svg" width="48" height="48">
<rect width="48" height="48" rx="8" fill="#063"/><path d="M12 24l8 8 16-16" stroke="#fff" stroke-width="5" fill="none"/></svg>
"""

SCRIPT = """
const show = (id, text) => { document.getElementById(id).textContent = text; tell(); };
const text = id => document.getElementById(id).textContent;
const tell = () => { if (parent !== window) parent.postMessage({
    socket: text('socket'), ticks: text('ticks'), upload: text('upload'), headers: text('headers'),
    search: location.search, cookie: document.cookie,
    color: getComputedStyle(document.querySelector('h1')).color }, '*'); };
const socket = new WebSocket(`ws://${location.host}/echo`);
socket.onopen = () => socket.send('hello');
socket.onmessage = message => show('socket', message.data);
socket.onerror = () => show('socket', 'failed');
const events = new EventSource('/events');
events.onmessage = message => { show('ticks', message.data); if (message.data === '5') events.close(); };
events.onerror = () => { if (text('ticks') === '-') show('ticks', 'failed'); };
fetch('/headers').then(answer => answer.text()).then(text => show('headers', text));
fetch('/upload', { method: 'POST', body: new Uint8Array(5 << 20) })
    .then(answer => answer.text()).then(text => show('upload', text));
"""


class Site(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.split("?")[0]
        files = {
            "/": ("text/html; charset=utf-8", PAGE),
            "/relative": ("text/html; charset=utf-8", RELATIVE),
            "/style.css": ("text/css", STYLE),
            "/image.svg": ("image/svg+xml", IMAGE),
            "/app.js": ("text/javascript", SCRIPT),
        }
        if path in files:
            self.answer(*files[path])
        elif path == "/headers":
            self.answer("application/json", json.dumps(dict(self.headers.items()), indent=1))
        elif path == "/events":
            self.events()
        elif path == "/echo":
            self.echo()
        else:
            self.answer("text/plain", "no such page", 404)

    def do_POST(self):
        left = int(self.headers.get("Content-Length", 0))
        total = 0
        while left > 0:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                return
            left -= len(piece)
            total += len(piece)
        self.answer("text/plain", f"{total} bytes")

    def answer(self, kind, text, status=200):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Set-Cookie", "site=1; Domain=localhost; Path=/")
        self.end_headers()
        self.wfile.write(body)

    def events(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for tick in range(1, 6):
            self.wfile.write(f"data: {tick}\n\n".encode())
            self.wfile.flush()
            time.sleep(0.1)
        self.close_connection = True

    def echo(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        while True:
            first, second = self.rfile.read(2)
            length = second & 127
            if length == 126:
                (length,) = struct.unpack(">H", self.rfile.read(2))
            mask = self.rfile.read(4)
            data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(self.rfile.read(length)))
            if first & 15 == 8:
                self.close_connection = True
                return
            reply = b"echo: " + data
            self.wfile.write(bytes([0x81, len(reply)]) + reply)
            self.wfile.flush()

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Site).serve_forever()
