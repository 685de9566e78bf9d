"""Try to reach another machine; print the error."""

import socket

try:
    socket.create_connection(("192.0.2.1", 80), 3)
except OSError as e:
    print(e)
