"""Verified, resumable downloads: the only module that opens sockets.

Addresses are HTTPS only, also after a redirect. A second try by plain HTTP would be safe, since
checksums guard every byte. But the log-in page of a hotel network would then count as wrong bytes
instead of no network, and every host in `conf/data` has HTTPS.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from sae_experiments.cache import cached
from sae_experiments.errors import UserError
from sae_experiments.files import read_json, sha256_file, write_json

BLOCK = 1 << 16


class UnreachableError(Exception):
    """No host answered; the caller may do without the file. The message names hosts and errors."""


class BrokenError(Exception):
    """A host answered, but not with the expected file."""


class _Redirect(urllib.request.HTTPRedirectHandler):
    def __init__(self, allowed: Callable[[str], None]) -> None:
        self.allowed = allowed

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
    ) -> Any:
        self.allowed(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclass(slots=True, kw_only=True)
class Network:
    """State of the network, shared by all corpora, so that its absence is noticed once.

    A host without an answer is not asked again. After `budget_s` seconds lost on such hosts, no
    new host is asked.
    """

    connect_s: float = 4.0
    """Limit for look-up, connection, encryption and first line of the answer together."""
    budget_s: float = 8.0
    """Seconds to lose on hosts that do not answer."""
    stall_s: float = 3.0
    """Silence that ends a connection; below `connect_s`, to leave time for IPv4 after IPv6."""
    tries: int = 4
    """Tries in a row without a new byte."""
    pause_s: float = 1.0
    """Pause before the second try; it grows with each."""
    plain_http: bool = False
    """Allow HTTP, for tests with a server on this machine."""
    lost_s: float = 0.0
    """Seconds lost so far."""
    failed: dict[str, str] = field(default_factory=dict)
    """Errors of the hosts that did not answer."""
    reached: set[str] = field(default_factory=set)
    """Hosts that answered."""

    def allowed(self, url: str) -> None:
        """Raise `BrokenError` unless `url` is an HTTPS address."""
        if urlsplit(url).scheme != "https" and not (
            self.plain_http and urlsplit(url).scheme == "http"
        ):
            raise BrokenError(f"{url} is not an https:// address")

    def open(self, url: str, start: int = 0) -> Any:
        """The server's answer from byte `start` on.

        Raises:
            UnreachableError: The host fails at the first contact.
            OSError: The host fails later.
        """
        self.allowed(url)
        host = urlsplit(url).netloc
        if host in self.failed:
            raise UnreachableError(self.failed[host])
        first, began = host not in self.reached, time.monotonic()
        limit = min(self.connect_s, self.budget_s - self.lost_s) if first else self.connect_s
        if limit <= 0:
            raise UnreachableError(
                f"{host} not asked, as {len(self.failed)} other hosts did not answer"
            )
        try:
            response = self._answer(url, start, limit)
        except urllib.error.HTTPError as error:  # the host can be reached, but this file cannot
            error.close()
            kind = UnreachableError if first else OSError
            raise kind(f"{host} answered HTTP {error.code}") from None
        except (OSError, http.client.HTTPException) as error:
            if not first:
                raise
            self.lost_s += time.monotonic() - began
            self.failed[host] = f"{host}: {getattr(error, 'reason', error) or type(error).__name__}"
            raise UnreachableError(self.failed[host]) from None
        self.reached.add(host)
        return response

    def _answer(self, url: str, start: int, limit: float) -> Any:
        """Ask in another thread, because a name look-up has no time limit."""
        headers = {"User-Agent": "sae_experiments", "Accept-Encoding": "identity"} | (
            {"Range": f"bytes={start}-"} if start else {}
        )
        request = urllib.request.Request(url, headers=headers)
        answers: queue.Queue[Any] = queue.Queue()
        late = threading.Event()

        def ask() -> None:
            try:
                response = urllib.request.build_opener(_Redirect(self.allowed)).open(
                    request, timeout=self.stall_s
                )
            except (OSError, http.client.HTTPException, ValueError, BrokenError) as error:
                answers.put(error)  # raised again below
                return
            response.close() if late.is_set() else answers.put(response)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=limit)
        except queue.Empty:
            late.set()
            raise TimeoutError(f"no answer in {limit:.1f} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


NETWORK = Network()


def verify(
    path: Path,
    what: str,
    *,
    size: int | None,
    sha256: str | None,
    md5: str | None = None,
    head: int | None = None,
) -> None:
    """Raise `BrokenError` unless a file has the expected size and checksums.

    Args:
        path: The file.
        what: Name of the file in messages.
        size: Size in bytes; None: any.
        sha256: Checksum in hexadecimal digits; None: not checked.
        md5: Checksum in hexadecimal digits; None: not checked.
        head: Number of bytes at the start that the checksums are of; None: all.
    """
    actual = path.stat().st_size
    part = "" if head is None else f" in its first {head:,} bytes"
    if size is not None and actual != size:
        raise BrokenError(f"{what} has {actual:,} bytes, expected {size:,}")
    for kind, name, expected in (("sha256", "SHA-256", sha256), ("md5", "MD5", md5)):
        if expected is not None and (got := checksum(path, kind, head)) != expected.lower():
            raise BrokenError(f"{what} has {name} {got}{part}, expected {expected.lower()}")


def checksum(path: Path, kind: str = "sha256", head: int | None = None) -> str:
    """SHA-256 or MD5 of the first `head` bytes of a file (None: all), as hexadecimal digits."""
    if kind == "sha256" and head is None:
        return sha256_file(path)
    hasher = hashlib.new(kind, usedforsecurity=False)
    left = path.stat().st_size if head is None else head
    with open(path, "rb") as f:
        while left and (data := f.read(min(1 << 20, left))):
            hasher.update(data)
            left -= len(data)
    return hasher.hexdigest()


def cached_text(
    cache: Path,
    name: str,
    sources: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    *,
    network: Network | None,
    say: Callable[[str], None],
) -> tuple[Path, str]:
    """The verified text of a corpus and its address, from the cache or else the network.

    Args:
        cache: Folder of the cache.
        name: Name of the corpus.
        sources: Addresses, tried in order.
        facts: `size`, `sha256` and `md5` of the text.
        network: State of the network; None: offline.
        say: Prints a line.

    Raises:
        UnreachableError: No source could be asked.
        BrokenError: A source sent something else; the message has the answer of each.
    """

    def make(folder: Path) -> None:
        if network is None:
            raise UnreachableError("offline, and not downloaded before")
        _fetch(folder, sources, facts, network, say)

    folder = cached(cache, "downloads", {"name": name, **facts}, make)
    return folder / "text", read_json(folder / "source.json")["url"]


def _fetch(
    folder: Path,
    sources: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    network: Network,
    say: Callable[[str], None],
) -> None:
    """Write `text` and `source.json`, continuing with the files of a call that was killed."""
    faults: list[Exception] = []
    for source in sources:
        part = folder / f"{hashlib.sha256(source['url'].encode()).hexdigest()[:16]}.part"
        try:
            download(source, part, network=network, say=say)
            _unpack(source, part, folder / "text.part", facts)
        except (UnreachableError, BrokenError) as fault:
            faults.append(fault)
            continue
        write_json(folder / "source.json", {"url": source["url"]})
        os.replace(folder / "text.part", folder / "text")
        for other in folder.glob("*.part"):
            other.unlink()
        return
    reasons = "; ".join(dict.fromkeys(map(str, faults))) or "no address is configured"
    broken = any(isinstance(fault, BrokenError) for fault in faults)
    raise (BrokenError if broken else UnreachableError)(reasons)


def _unpack(source: Mapping[str, Any], part: Path, text: Path, facts: Mapping[str, Any]) -> None:
    try:
        extract(source, part, text, size=facts["size"])
        verify(text, f"the text from {source['url']}", **facts)
    except BrokenError:  # every later run would refuse the same wrong bytes again
        part.unlink(missing_ok=True)
        text.unlink(missing_ok=True)
        raise


def download(
    source: Mapping[str, Any], part: Path, *, network: Network, say: Callable[[str], None]
) -> None:
    """Complete the file `part`, continuing with the bytes it has.

    Raises:
        BrokenError: The result is not the file that `source` describes.
    """
    url, size, resumed = source["url"], source["bytes"], part.exists()
    with _progress(url, size, say) as at:
        _pull(url, size, part, network, at)
    try:
        verify(part, url, size=size, sha256=source.get("sha256"), md5=source.get("md5"))
    except BrokenError:
        part.unlink()
        if not resumed:
            raise
        # The beginning may have been another file's: once more, from the start.
        download(source, part, network=network, say=say)


@contextmanager
def _progress(url: str, size: int, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """Show progress: a bar on a terminal, else a line at the first bytes and one at the end.

    Yields:
        A function that takes the number of bytes so far.
    """
    bar, last = None, -1

    def at(have: int) -> None:
        nonlocal bar, last
        if last < 0 and sys.stdout.isatty():
            bar = tqdm(
                total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], file=sys.stdout
            )
        elif last < 0:
            say(f"fetching {url} ({size:,} bytes{f', resumed at {have:,}' if have else ''})")
        if bar is not None:
            bar.update(have - bar.n)
        last = have

    try:
        yield at
    finally:
        if bar is not None:
            bar.close()
        elif last >= 0:
            say(f"fetched {last:,} of {size:,} bytes of {url}")


def _pull(url: str, size: int, part: Path, network: Network, at: Callable[[int], None]) -> None:
    best, vain = -1, 0
    while (have := part.stat().st_size if part.exists() else 0) < size:
        vain, best = (0, have) if have > best else (vain + 1, best)
        if vain >= network.tries:
            raise BrokenError(
                f"{url} broke off at {best:,} of {size:,} bytes, {vain} times in a row; "
                "run again to resume"
            )
        time.sleep(vain * network.pause_s)
        try:
            with network.open(url, have) as response:
                _append(response, url, size, part, have, at)
        except (OSError, http.client.HTTPException) as error:  # counted above unless bytes came
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"no room for {part} ({size:,} bytes); free some, or move the cache"
                ) from None


def _append(
    response: Any, url: str, size: int, part: Path, have: int, at: Callable[[int], None]
) -> None:
    if not (
        response.status == 206
        and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    ):
        have = 0  # a server without ranges sends the whole file
    announced = response.headers.get("Content-Length")
    if announced is not None and int(announced) != size - have:
        raise BrokenError(f"{url} has {int(announced) + have:,} bytes, expected {size:,}")
    with open(part, "r+b" if have else "wb") as f:
        f.seek(have)
        at(have)
        while data := response.read1(BLOCK):
            have += len(data)
            if have > size:
                raise BrokenError(f"{url} has more than the expected {size:,} bytes")
            f.write(data)
            f.flush()  # so that a kill loses nothing that came
            at(have)


def extract(source: Mapping[str, Any], archive: Path, text: Path, *, size: int) -> None:
    """Write the text in an archive to `text`, at most `size` bytes of it.

    Raises:
        BrokenError: The archive cannot be unpacked, or holds something else.
    """
    kind, url = source.get("archive"), source["url"]
    try:
        if kind is None:
            os.replace(archive, text)
        elif kind == "gz":
            with gzip.open(archive) as member:
                _copy(member, text, size, url)
        else:
            with zipfile.ZipFile(archive) as folder, folder.open(source["member"]) as member:
                _copy(member, text, size, url)
    except KeyError:
        raise BrokenError(f"{url} has no member {source['member']!r}") from None
    except (EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise BrokenError(f"{url} cannot be unpacked ({error})") from None


def _copy(member: BinaryIO | Any, text: Path, size: int, url: str) -> None:
    have = 0
    with open(text, "wb") as out:
        while data := member.read(BLOCK):
            have += len(data)
            if have > size:
                raise BrokenError(f"{url} unpacks to more than the expected {size:,} bytes")
            out.write(data)
