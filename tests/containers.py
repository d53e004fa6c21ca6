"""Builds images with buildah on a base made here, and runs them with podman: all without a registry or a daemon."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CACHE = Path("~/.cache/vaedist-tests/containers").expanduser()  # images and what builds download, from test to test
BASE = "docker.io/library/python:3.11-slim-bookworm"
PROGRAMS = ("buildah", "podman", "debootstrap")
HIDE_VERSION_1 = 'umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'


def require() -> None:
    """Skips the test where it cannot build an image."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs {', '.join(missing)}" if missing else "needs root, for debootstrap")


def call(*words: object, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """A command of buildah or podman; with a store of its own, which leaves the user's alone."""
    command = [str(word) for word in words]
    if command[0] == "podman" and Path("/sys/fs/cgroup/unified").exists():  # both versions of cgroups, which it refuses
        command = ["unshare", "--mount", "sh", "-c", HIDE_VERSION_1, "sh", *command]
    CACHE.mkdir(parents=True, exist_ok=True)
    settings = CACHE / "storage.conf"
    settings.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{CACHE}/graph"\nrunroot = "{CACHE}/run"\n')
    where = {"CONTAINERS_STORAGE_CONF": str(settings), "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(CACHE)}
    return subprocess.run(command, env=os.environ | where, capture_output=True, text=True, timeout=timeout)


def ask(*words: object, timeout: int = 600) -> str:
    """What a command prints that must not fail."""
    done = call(*words, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout.strip()


def build(context: Path, tag: str, **arguments: str) -> None:
    """The image of a Dockerfile, on the stand-in of its base."""
    if call("buildah", "inspect", "--type", "image", BASE).returncode != 0:
        make_base()
    given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    ask("buildah", "bud", "--pull-never", "--layers", "--format", "docker", *given, "-t", tag, context, timeout=3600)


def make_base() -> None:
    """Debian's Python under the tag of the official image; it trusts the certificates that this host trusts."""
    with tempfile.TemporaryDirectory(dir=CACHE) as root:
        packages = "ca-certificates,python3-dev,python3-pip,python3-venv"
        ask("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root, timeout=1800)
        Path(root, "usr/bin/python").symlink_to("python3")
        bundle = "etc/ssl/certs/ca-certificates.crt"
        shutil.copy(f"/{bundle}", Path(root, bundle))
        container = ask("buildah", "from", "scratch")
        ask("buildah", "copy", container, root, "/")
    trust = [word for name in ("SSL_CERT_FILE", "PIP_CERT") for word in ("--env", f"{name}=/{bundle}")]
    path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    ask("buildah", "config", *trust, "--env", path, "--cmd", "python3", container)
    ask("buildah", "commit", "--rm", container, BASE)


def run(*words: object, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """`podman run` without a network, and without what it may do on a host of its own only.

    The limits may not be raised everywhere, cgroups not be made, and a timer of health checks needs systemd.
    """
    limits = [f"--ulimit={name}={value}:{value}" for name, value in (("nofile", 1024), ("nproc", 4096))]
    alone = ("--network=none", "--cgroups=disabled", "--health-interval=disable", *limits)
    return call("podman", "run", *alone, *words, timeout=timeout)
