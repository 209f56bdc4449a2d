"""Encoders that are networks of PyTorch, by the text that every command takes.

    torch:package.module:make[,ARGUMENTS]     a function that returns a torch.nn.Module
    torch:file.py:make[,ARGUMENTS]
    timm:NAME[@WEIGHTS][,ARGUMENTS]           a file of weights; the hub's; "random"
    hf:DIRECTORY[,ARGUMENTS]                  as `save_pretrained` writes it
    hf:ID[@REVISION][,ARGUMENTS]              of the hub

ARGUMENTS are name=value with commas between: input_size, output, preparation, mean, std
("imagenet", "clip" or a number), trust_remote_code; of `torch:` those of the function, too. A
function may also return (module, {"input_size": ..., "mean": ..., ...}).
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from typing import Any

from ur_jax.encoders import factories, torch_files
from ur_jax.encoders.base import Encoder, Origin
from ur_jax.encoders.bridge import families, hub
from ur_jax.encoders.bridge.families import Images
from ur_jax.encoders.bridge.module import from_torch
from ur_jax.encoders.bridge.packages import import_timm
from ur_jax.errors import UserError, require, shown, unknown_name
from ur_jax.registry import import_object

SCHEMES = ("torch", "timm", "hf")
_SETTINGS = ("input_size", "output", "preparation", "mean", "std", "name")


def is_place(text: str) -> bool:
    """Whether a text names a network of PyTorch."""
    scheme, colon, rest = text.partition(":")
    return scheme in SCHEMES and bool(colon and rest) and not rest.startswith("//")


def load(
    text: str, representation: str = "paper", dtype: str = "float32", *, fold: bool = True
) -> Encoder:
    """Makes the encoder that a text names; needs PyTorch, and what the scheme needs.

    Says on the standard error stream what is taken, and how images are prepared.

    Args:
      text: see above.
      representation: an output, as `from_torch` names them; "paper" and "features" are what the
        family's users take, "backbone" what comes before a projection.
      dtype: "float32" or "bfloat16".
      fold: as in `from_torch`; without it the encoder can be trained and written back.

    Raises:
      UserError: in one line, for whatever cannot be found, fetched, loaded or exported.
      MissingPackageError: without PyTorch, timm or transformers.
    """
    scheme, _, rest = text.partition(":")
    place, arguments = _split(scheme, rest)
    if representation not in factories.DEFAULT_REPRESENTATIONS:
        arguments["output"] = representation
    made = {"torch": _of_function, "timm": _of_timm, "hf": _of_hub}[scheme](place, arguments)
    settings = made.settings
    encoder = from_torch(made.module, dtype=dtype, fold=fold, **settings)
    if made.pooled:  # a name of ours for an output
        encoder = encoder.replace(representation=made.pooled)
    size = "x".join(map(str, encoder.input_size))
    print(
        f"{encoder.name}: {encoder.representation}, {encoder.dimension} numbers; images {size}, "
        f"{encoder.preparation}, mean {_digits(encoder.mean)}, std {_digits(encoder.std)} "
        f"({made.said}).",
        file=sys.stderr,
    )
    return encoder.replace(origin=Origin(f"{scheme}:{place}", {**arguments, **made.record}))


@dataclasses.dataclass
class Made:
    """A module, how it becomes an encoder, and what is to be recorded of it.

    Attributes:
      module: the module.
      settings: keyword arguments of `from_torch`.
      record: where it is from: revision, hashes.
      said: where its preparation is from.
      pooled: name of the output, where it is not the module's own.
    """

    module: Any
    settings: dict[str, Any]
    record: dict[str, Any]
    said: str
    pooled: str = ""


def _digits(values: tuple[float, ...]) -> str:
    return "/".join(f"{v:.4g}" for v in dict.fromkeys(values))


def _split(scheme: str, rest: str) -> tuple[str, dict[str, Any]]:
    """The place and the arguments of what follows the scheme."""
    place, arguments = factories.split_arguments(rest)
    if not place:
        raise UserError(f"Expected something after {scheme}:, see `ur-jax convert-weights --help`.")
    allowed = {*_SETTINGS, *({"trust_remote_code"} if scheme == "hf" else ())}
    if scheme != "torch" and (unknown := sorted(set(arguments) - allowed)):
        raise unknown_name(f"argument of {scheme}:", unknown[0], allowed)
    return place, arguments


def _chosen(arguments: Mapping[str, Any], images: Images | None, place: str) -> dict[str, Any]:
    """How images are prepared: as the arguments say, otherwise the network's own."""
    given = {k: v for k, v in arguments.items() if k in _SETTINGS}
    size = given.get("input_size")
    if isinstance(size, int):
        size = (size, size)
    elif isinstance(size, str) and all(part.isdigit() for part in size.split("x")):
        sides = [int(part) for part in size.split("x")]
        size = (sides[0], sides[-1])
    if size is None and images is None:
        raise UserError(
            f"{place} does not say how large its images are: add ,input_size=224, or have the "
            "function "
            'return (module, {"input_size": (224, 224), "mean": ..., "std": ...}).'
        )
    settings: dict[str, Any] = {"input_size": size or (images and images.size)}
    if not (isinstance(settings["input_size"], (tuple, list)) and len(settings["input_size"]) == 2):
        raise UserError(f"Expected input_size as 224 or 224x336, got {shown(size)}.")
    preparation = given.get("preparation")
    if preparation is None and images is not None:
        preparation = _scaled(images, tuple(settings["input_size"]))
    settings["preparation"] = preparation or "resize"
    for number, key in enumerate(("mean", "std")):
        value = given.get(key)
        if isinstance(value, str):
            if value not in families.NAMED_STATISTICS:
                raise unknown_name(key, value, families.NAMED_STATISTICS)
            value = families.NAMED_STATISTICS[value][number]
        elif isinstance(value, (int, float)):
            value = (float(value),) * 3
        if value is None:
            value = getattr(images, key) if images is not None else (float(number),) * 3
        settings[key] = value
    return settings


def _scaled(images: Images, size: tuple[int, int]) -> str:
    """The preparation for another size: the shorter side in the same relation to the crop."""
    from ur_jax.encoders.preparation import parse_preparation

    kind = parse_preparation(images.preparation)
    if size == images.size or not kind.shorter:
        return images.preparation
    shorter = round(kind.shorter * max(size) / max(images.size))
    return dataclasses.replace(kind, shorter=shorter).name


def _of_function(place: str, arguments: dict[str, Any]) -> Made:
    """Of a function that returns a module, or (module, settings)."""
    torch: Any = require("torch", "torch", "An encoder of torch:")
    function = import_object(place)
    if not callable(function):
        raise UserError(f"Expected a function at {place}, got {type(function).__name__}.")
    import inspect

    try:
        takes = set(inspect.signature(function).parameters)
    except ValueError:  # of C
        takes = set()
    own = {k: v for k, v in arguments.items() if k in takes}
    if unknown := [k for k in arguments if k not in takes and k not in _SETTINGS]:
        raise unknown_name(f"argument of {place}", unknown[0], {*takes, *_SETTINGS})
    made = function(**own)
    said: dict[str, Any] = {}
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Mapping):
        made, said = made[0], dict(made[1])
        if unknown := sorted(set(said) - set(_SETTINGS)):
            raise unknown_name(f"setting that {place} returns", unknown[0], _SETTINGS)
    if isinstance(made, Encoder):
        raise UserError(f"{place} makes an Encoder already: give it as {place}, without torch:.")
    if not isinstance(made, torch.nn.Module):
        raise UserError(f"Expected {place} to return a torch.nn.Module, got {type(made).__name__}.")
    given = {**said, **{k: v for k, v in arguments.items() if k in _SETTINGS}}
    settings = _chosen(given, None, place)
    settings |= {"output": given.get("output"), "name": given.get("name") or type(made).__name__}
    return Made(made, settings, {}, "as its function says")


def _of_timm(place: str, arguments: dict[str, Any]) -> Made:
    """Of timm's registry, with the hub's weights, a file's, or random ones."""
    timm: Any = import_timm()
    name, _, weights = place.partition("@")
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise UserError(f"timm {timm.__version__} has no architecture {base!r}{hint}")
    kept = any(part in base for part in families.KEPT_HEADS)
    output = arguments.get("output")
    options: dict[str, Any] = {}
    if not kept or output == "backbone":
        options["num_classes"] = 0
    if any(part in base for part in families.CLASS_TOKENS) and "vit" in base:
        options["global_pool"] = "token"
    size = arguments.get("input_size")
    module = _made_by_timm(timm, name, weights, options, size)
    record: dict[str, Any] = {}
    if weights == "random":
        print(f"{name}: with random weights.", file=sys.stderr)
    elif weights:
        record["sha256"] = _fill(module, weights, name)
    config = timm.data.resolve_data_config(model=module)
    settings = _chosen(arguments, families.images_of_timm(config, name), name)
    is_normalized = output is None and any(part in base for part in families.NORMALIZED)
    if output in (None, "backbone"):
        settings["output"] = "output.normalized" if is_normalized else None
    else:
        settings["output"] = output
    settings["name"] = arguments.get("name") or base
    pooled = "backbone" if output == "backbone" else ""
    return Made(module, settings, record, f"timm {timm.__version__}", pooled)


def _made_by_timm(timm: Any, name: str, weights: str, options: dict, size: Any) -> Any:
    """The network; positions for another image size are interpolated as timm does it."""
    options = dict(options)
    pretrained = not weights
    if pretrained:
        hub.offline_if_unreachable()
    try:
        try:
            sized = {} if size is None else {"img_size": size}
            return timm.create_model(name, pretrained=pretrained, **options, **sized)
        except TypeError:  # it has no such option
            if "global_pool" in options:
                options.pop("global_pool")
            return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise UserError(
                f"timm cannot make {name!r} ({type(error).__name__}: {str(error)[:200]})."
            ) from error
        raise UserError(
            f"The weights of timm's {name!r} are not here and cannot be fetched "
            f"({type(error).__name__}): give their file, timm:{name}@weights.safetensors, or take "
            "random "
            f"ones, timm:{name}@random."
        ) from error


def _fill(module: Any, path: str, name: str) -> str:
    """Puts the weights of a file into a network; returns the file's hash."""
    import torch

    read = torch_files.read_tensors(path, ("state_dict",))
    state = {key: torch.from_numpy(value.copy()) for key, value in read.tensors.items()}
    have = module.state_dict()
    classifier = (getattr(module, "pretrained_cfg", {}) or {}).get("classifier") or "head"
    heads = tuple(classifier) if isinstance(classifier, (tuple, list)) else (classifier,)
    unexpected = sorted(k for k in state if k not in have and not k.startswith(heads))
    missing = sorted(k for k in have if k not in state and not k.endswith("num_batches_tracked"))
    shapes = sorted(k for k in have if k in state and have[k].shape != state[k].shape)
    if missing or unexpected or shapes:
        raise UserError(
            f"The weights in {path} are not those of timm's {name!r}: {len(missing)} missing, "
            f"{len(unexpected)} unexpected, {len(shapes)} of another shape "
            f"({', '.join([*missing, *unexpected, *shapes][:3])}); save that network's "
            "state_dict()."
        )
    module.load_state_dict({k: v for k, v in state.items() if k in have}, strict=False)
    return torch_files.file_sha256(path)


def _of_hub(place: str, arguments: dict[str, Any]) -> Made:
    """Of a folder as transformers writes it, or of the hub."""
    found = hub.snapshot(place)
    config = hub.read_json(found.folder / "config.json")
    family = families.family_of(config, found.name)
    output, wanted = arguments.get("output"), family.classes
    if output == "backbone":
        wanted = family.backbone_class or family.classes
        entry = family.backbone or family.output
    else:
        entry = output or family.output
    trusted = bool(arguments.get("trust_remote_code"))
    model = hub.load_model(found, wanted, config, trust_remote_code=trusted)
    images, said = family.images, "the family's, as there is no preprocessor_config.json"
    processor = found.folder / "preprocessor_config.json"
    if processor.is_file():
        images = families.images_of_processor(hub.read_json(processor), found.name)
        said = "its preprocessor_config.json"
    native = config.get("image_size") or (config.get("vision_config") or {}).get("image_size")
    if isinstance(native, int) and not processor.is_file() and images is not None:
        images = dataclasses.replace(
            images, size=(native, native), preparation=_scaled(images, (native, native))
        )
    channels = getattr(getattr(model, "config", None), "num_channels", 3)
    if channels != 3:
        raise UserError(f"{found.name} takes images of {channels} channel(s), not 3.")
    settings = _chosen(arguments, images, found.name)
    settings |= {"output": entry, "name": arguments.get("name") or found.name.rpartition("/")[2]}
    record = {"revision": found.revision, "sha256": found.sha256}
    module = _Vision(model, native, tuple(settings["input_size"]))
    return Made(module, settings, record, said, "backbone" if output == "backbone" else "")


def _Vision(model: Any, native: Any, size: tuple[int, int]) -> Any:
    """A network of transformers as a module of images; positions interpolated as it does it."""
    import inspect

    import torch

    takes = inspect.signature(model.forward).parameters
    sides = (native, native) if isinstance(native, int) else tuple(native or size)
    keywords = {}
    if "interpolate_pos_encoding" in takes and sides != size:
        keywords["interpolate_pos_encoding"] = True

    class Vision(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(pixel_values=images, **keywords)

    return Vision().eval()
