"""A real sidecar process as an application sees it: frames on descriptors 3 and 4 of a session of its own.

Framing and msgpack are independent of the package under test.
"""

import fcntl
import os
import select
import struct
import sys
import termios
import time

import msgpack
import psutil


class Closed(Exception):
    """The sidecar's end of the frames is closed."""


class Sidecar:
    def __init__(self, arguments=("-m", "starweave_image", "port"), env=None, stderr=2):
        sidecar_in, self._to = _pipe()
        self._from, sidecar_out = _pipe()
        self.started = time.monotonic()
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, *arguments],
            {**os.environ, **(env or {})},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, sidecar_in, 3),
                (os.POSIX_SPAWN_DUP2, sidecar_out, 4),
                (os.POSIX_SPAWN_DUP2, stderr, 2),
                (os.POSIX_SPAWN_DUP2, stderr, 1),
            ],
            setsid=True,
        )
        self._process = psutil.Process(self.pid)
        self._code = None
        os.close(sidecar_in)
        os.close(sidecar_out)

    def send(self, message):
        self.send_body(msgpack.packb(message))

    def send_body(self, body):
        self.send_bytes(struct.pack(">I", len(body)) + body)

    def send_bytes(self, data):
        while data:
            data = data[os.write(self._to, data) :]

    def receive_body(self, timeout):
        deadline = time.monotonic() + timeout
        (length,) = struct.unpack(">I", self._read(4, deadline))
        return self._read(length, deadline)

    def receive(self, timeout=60):
        return msgpack.unpackb(self.receive_body(timeout))

    def expect(self, type, timeout=60, **fields):
        """The next message of `type` with these fields; others, heartbeats for instance, are passed over."""
        return self._until([type], fields, time.monotonic() + timeout)[-1]

    def collect_until(self, *types, timeout=60, **fields):
        """Every message with these fields, up to and with the first of one of `types`."""
        messages = self._until(types, fields, time.monotonic() + timeout)
        return [message for message in messages if _has(message, fields)]

    def hello(self, generation=1, **config):
        self.send({"t": "hello", "v": 1, "g": generation, "config": config})

    def drain_frames(self, timeout=60):
        """Every message up to the end of the frames."""
        messages = []
        deadline = time.monotonic() + timeout
        while True:
            try:
                messages.append(self.receive(deadline - time.monotonic()))
            except Closed:
                return messages

    def close_input(self):
        os.close(self._to)
        self._to = -1

    def close_output(self):
        os.close(self._from)
        self._from = -1

    def output_is_full(self):
        """Whether what it wrote and nobody has read is more than half of what the pipe holds: pages are not all full."""
        unread = struct.unpack("i", fcntl.ioctl(self._from, termios.FIONREAD, b"\0" * 4))[0]
        return unread > 0.5 * fcntl.fcntl(self._from, fcntl.F_GETPIPE_SZ)

    def signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=60):
        """The exit code; a negative number is the signal that ended the process."""
        if self._code is None:
            self._code = self._process.wait(timeout)
        return self._code

    def kill(self):
        if self._code is None:
            os.kill(self.pid, 9)
            self.wait()
        for fd in (self._to, self._from):
            if fd >= 0:
                os.close(fd)

    def _until(self, types, fields, deadline):
        messages = []
        while not messages or messages[-1]["t"] not in types or not _has(messages[-1], fields):
            try:
                messages.append(self.receive(deadline - time.monotonic()))
            except (Closed, TimeoutError) as error:
                passed = [{**message, "data": None} for message in messages[-20:]]
                raise AssertionError(f"no {types} with {fields}, only {passed}") from error
        return messages

    def _read(self, size, deadline):
        data = b""
        while len(data) < size:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self._from], [], [], remaining)[0]:
                raise TimeoutError("the sidecar sent nothing more in time")
            chunk = os.read(self._from, size - len(data))
            if not chunk:
                raise Closed
            data += chunk
        return data


def _has(message, fields):
    return all(message.get(name) == value for name, value in fields.items())


def _pipe():
    # Numbers above those that the spawned process gets, so that no dup2 there overwrites a source.
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high
