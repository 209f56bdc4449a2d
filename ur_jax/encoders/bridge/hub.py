"""Networks of Hugging Face: a folder, or a snapshot that `huggingface_hub` brings."""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ur_jax.encoders import torch_files
from ur_jax.encoders.bridge.packages import import_transformers
from ur_jax.errors import NotFoundError, UserError, require

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = ("*.safetensors", "*.bin")


class Snapshot(NamedTuple):
    """A folder with config.json and weights.

    Attributes:
      folder: where it is.
      name: of the model, for records: the hub's name or the folder's.
      revision: commit of the hub; None of a folder.
      sha256: {weights file: hash}.
    """

    folder: Path
    name: str
    revision: str | None
    sha256: dict[str, str]


def snapshot(text: str) -> Snapshot:
    """Finds DIRECTORY or ID[@REVISION].

    Raises:
      NotFoundError: for what is neither here nor on the hub.
      UserError: for a model that is gated, a revision that there is not, a hub that cannot be
        reached, a folder without configuration or weights.
    """
    if os.path.isdir(text):
        return _of_folder(Path(text), Path(text).resolve().name, None)
    name, _, revision = text.partition("@")
    if os.path.isdir(name):
        raise UserError(f"Expected no revision with the folder {name}, got {revision!r}.")
    if not _ID.fullmatch(name) or name.startswith("."):
        near = _near(Path(text)) or "; check the path."
        raise NotFoundError(f"There is no folder {text}{near}")
    return _of_folder(_fetched(name, revision or None), name, None)


def _near(path: Path) -> str:
    """A hint at a neighbour of a path that is not there."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def offline_if_unreachable() -> None:
    """Has the hub's client say at once that there is no network, rather than try for a minute."""
    constants: Any = require("huggingface_hub.constants", "hf", "Fetching weights")
    host = constants.ENDPOINT.partition("://")[2].partition("/")[0].partition(":")[0]
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _fetched(name: str, revision: str | None) -> Path:
    """The hub's snapshot, of this machine's cache or of the network."""
    hub: Any = require("huggingface_hub", "hf", f"Fetching {name}")
    errors: Any = require("huggingface_hub.errors", "hf", f"Fetching {name}")
    offline_if_unreachable()
    what = f"{name}{f' at {revision}' if revision else ''}"
    try:
        folder = hub.snapshot_download(
            name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.py"]
        )
        if not list(Path(folder).glob("*.safetensors")):
            folder = hub.snapshot_download(
                name, revision=revision, allow_patterns=["*.json", "*.bin"]
            )
        return Path(folder)
    except errors.GatedRepoError as error:
        raise UserError(
            f"The model {name} is gated: accept its terms on its page of the hub, then log in by "
            "`hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"The model {name} has no revision {revision!r}; see its page.") from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"There is no folder {name} here{_near(Path(name))} and no model of that name on the "
            "hub, or "
            "it is private (`hf auth login`)."
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"The model {what} is not on this machine, neither as a folder{_near(Path(name))} nor "
            "in the "
            f"hub's cache, and the hub cannot be reached ({type(error).__name__}): fetch it where "
            "there is a network and give its folder."
        ) from error
    except Exception as error:
        raise UserError(
            f"The model {what} cannot be fetched ({type(error).__name__}: {str(error)[:150]}); "
            "give "
            "the folder of a snapshot."
        ) from error


def _of_folder(folder: Path, name: str, revision: str | None) -> Snapshot:
    """A folder that is looked at: configuration, weights, pickles without code."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"Expected config.json in {folder}, as `save_pretrained` writes it; it has "
            f"{_listed(folder)}."
        )
    files = sorted({f for pattern in _WEIGHTS for f in folder.glob(pattern)})
    kept = [f for f in files if f.suffix == ".safetensors"] or [
        f for f in files if f.name.startswith("pytorch_model")
    ]
    if not kept:
        raise UserError(
            f"{folder} has config.json but no weights (*.safetensors, pytorch_model.bin); fetch "
            "the "
            "whole snapshot."
        )
    for file in kept:
        if file.suffix == ".bin":  # before transformers reads it: what it may ask for
            torch_files.read_tensors(file, ())
    if folder.parent.name == "snapshots":
        revision = folder.name
    hashes = {file.name: torch_files.file_sha256(file) for file in kept}
    return Snapshot(folder, name, revision, hashes)


def _listed(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a snapshot."""
    try:
        data = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch it again.") from None
    if not isinstance(data, dict):
        raise UserError(f"Expected an object in {path}, got {type(data).__name__}.")
    return data


def load_model(
    found: Snapshot, class_name: str, config: Mapping[str, Any], *, trust_remote_code: bool
) -> Any:
    """The network with its weights, in float32.

    Raises:
      UserError: for weights that do not fit its class, or code of the hub that is not trusted.
    """
    transformers: Any = import_transformers()
    if class_name == "AutoModel" and "auto_map" in config and not trust_remote_code:
        raise UserError(
            f"{found.name} is a network of its own code, which would run on this machine: read "
            "it, then "
            "say --trust-remote-code (or ,trust_remote_code=True)."
        )
    if not hasattr(transformers, class_name):
        raise UserError(
            f"transformers {transformers.__version__} has no {class_name}, which {found.name} "
            "needs; "
            "upgrade it."
        )
    settings: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    if trust_remote_code:
        settings["trust_remote_code"] = True
    if "Projection" in class_name and "vision_config" in config and "projection_dim" in config:
        settings["projection_dim"] = config["projection_dim"]  # the vision part may not say it
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        cls = getattr(transformers, class_name)
        model, info = cls.from_pretrained(
            found.folder, dtype="float32", attn_implementation="sdpa", **settings
        )
    except UserError:
        raise
    except Exception as error:
        if "sdpa" in str(error) or "scaled_dot_product" in str(error):
            model, info = getattr(transformers, class_name).from_pretrained(
                found.folder, dtype="float32", **settings
            )
        else:
            text = " ".join(str(error).split())[:300]
            raise UserError(
                f"{found.name} cannot be loaded as {class_name} ({type(error).__name__}: {text})"
            ) from error
    finally:
        transformers.logging.set_verbosity(level)
    missing = sorted(_needed(info.get("missing_keys", ())))
    wrong = sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing or wrong:
        shown = ", ".join([*missing, *wrong][:3])
        raise UserError(
            f"The weights of {found.name} do not fit {class_name}: {len(missing)} tensors are "
            "missing and "
            f"{len(wrong)} have another shape ({shown}): another class of network was saved there"
            f"{_advice(class_name)}."
        )
    return model


def _needed(keys: Any) -> set[str]:
    """Missing tensors that count: a pooler on top is not what is taken."""
    return {str(key) for key in keys if not re.match(r"(\w+\.)?pooler\.", str(key))}


def _advice(class_name: str) -> str:
    return "; without its projection take --output backbone" if "Projection" in class_name else ""
