"""Lines come back over TLS, a thread for each connection: tls_echo.py ADDRESS PORT CERTIFICATE."""

import socketserver
import ssl
import sys


class Echo(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)
        self.request.unwrap()


address, port, certificate = sys.argv[1:]
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(certificate)


class Server(socketserver.ThreadingTCPServer):
    request_queue_size = 50

    def get_request(self):
        accepted, peer = super().get_request()
        return context.wrap_socket(accepted, server_side=True), peer


Server((address, int(port)), Echo).serve_forever()
