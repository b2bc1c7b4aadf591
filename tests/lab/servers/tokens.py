"""Server-sent events, a number every 20 ms until a file is there: tokens.py PORT FILE."""

import http.server
import sys
import time
from pathlib import Path

port, end = sys.argv[1:]


class Tokens(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        number = 0
        while not Path(end).exists():
            self.wfile.write(b"data: %d\n\n" % number)
            number += 1
            time.sleep(0.02)


http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Tokens).serve_forever()
