"""Files of the network, each whole or not at all: zips of text, files of Hugging Face's hub."""

import http.client
import os
import re
import shutil
import urllib.error
import urllib.request

from tqdm import tqdm

TIMEOUT = 20  # seconds without an answer before a download is given up


def download(url: str, path: str, token: str | None = None):
    """Fetch a file, with a progress bar; OSError, and no new file, if it does not come whole."""
    # Some hosts answer 403 to Python's own User-Agent. The token goes to no host that this one
    # redirects to.
    request = urllib.request.Request(url, headers={"User-Agent": "mega/1.0"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    part = f"{path}.{os.getpid()}.part"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, open(part, "wb") as file:
            size, shown = answer.length, {"unit": "B", "unit_scale": True, "disable": None}
            name = os.path.basename(path)
            with tqdm.wrapattr(answer, "read", total=size, desc=name, **shown) as body:
                shutil.copyfileobj(body, file)
        got = os.path.getsize(part)
        if size is not None and got != size:
            raise OSError(f"it broke off after {got:,} of {size:,} bytes; try again")
        os.replace(part, path)
    except http.client.HTTPException as error:  # the one kind that is no OSError
        raise OSError(f"{type(error).__name__}: {error}") from error
    finally:
        if os.path.exists(part):
            os.remove(part)


def find_file(source: str, *names: str) -> str:
    """The path of the first of `names` that a folder, the cache, or else the hub has.

    `source` is a folder or an `owner/name` of the hub. FileNotFoundError if it has none, OSError
    if it can't be asked. Of Hugging Face's environment variables HF_ENDPOINT, HF_HUB_OFFLINE,
    HF_TOKEN and HF_HOME, where the cache is, are known.
    """
    folder, repository = str(source), not os.path.isdir(source)
    if repository and not os.path.exists(source) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", folder):
        home = os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")
        folder = os.path.join(home, "mega", folder.replace("/", "--"))
    paths = {name: os.path.join(folder, name) for name in names}
    for path in paths.values():
        if os.path.exists(path):
            return path
    if folder == str(source):
        raise FileNotFoundError(f"{source} has no {' or '.join(names)}")
    wanted = f"{source} is no folder here, and {' or '.join(names)} of it"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise FileNotFoundError(f"{wanted} is not in {folder}; HF_HUB_OFFLINE forbids a download")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and (token.isprintable() or not token)):
        raise OSError("HF_TOKEN has characters that no token has")  # and is not shown
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    for name, path in paths.items():
        try:
            download(f"{hub}/{source}/resolve/main/{name}", path, token)
            return path
        except urllib.error.HTTPError as error:
            if error.code != 404:
                right = "; is the name right, and HF_TOKEN set if it is private?"
                hint = right if error.code in (401, 403) else ""
                raise OSError(f"{wanted} can't be had from {hub} ({error}){hint}") from None
        except (OSError, ValueError) as error:  # ValueError: an endpoint that is no URL
            reason = getattr(error, "reason", error)
            raise OSError(f"{wanted} can't be had from {hub} ({reason})") from None
    raise FileNotFoundError(f"{wanted} is not at {hub}")
