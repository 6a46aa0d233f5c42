"""Stands for an application that can be killed: starts a sidecar and relays its frames.

Standard input: one frame body a line, in hexadecimal. Standard output: the sidecar's process id, then its frame
bodies likewise. The sidecar's log is this program's standard error.
"""

import sys
import threading

from sidecar import Sidecar


def main():
    sidecar = Sidecar(sys.argv[1:])
    print(sidecar.pid, flush=True)

    def forward():
        for line in sys.stdin:
            sidecar.send_body(bytes.fromhex(line))

    threading.Thread(target=forward, daemon=True).start()
    while True:
        print(sidecar.receive_body(600).hex(), flush=True)


if __name__ == "__main__":
    main()
