"""How a training method is added: its settings, what it begins with, its name.

    @register("mine")
    @dataclasses.dataclass(frozen=True)
    class MineConfig(MethodConfig):       # its fields are flags of the command `train`
        margin: float = 0.1

        def views(self, size): ...        # the random views that it looks at
        def make(self, start): ...        # a `step.Method`, and the variables that it begins with

A file of one's own that does so is taken by `--plugin FILE.py`; then `--method mine` is there.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

from ur_jax.encoders import loading
from ur_jax.encoders.base import DTYPES, Encoder
from ur_jax.encoders.loading import Loaded
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.errors import UserError, unknown_name
from ur_jax.registry import Registry
from ur_jax.training.step import Method
from ur_jax.training.views import AugmentConfig
from ur_jax.typed import check_types
from ur_jax.types import PyTree

C = TypeVar("C", bound="MethodConfig")


class Epochs(NamedTuple):
    """Where a run lies in the schedules.

    Attributes:
      steps_per_epoch: steps that make one epoch.
      num_epochs: epoch at which the schedules end.
      start_epoch: epoch of step 0.
    """

    steps_per_epoch: int
    num_epochs: float
    start_epoch: float


@dataclasses.dataclass(frozen=True)
class Start:
    """What a method is made from.

    Attributes:
      loaded: a network of this package with its variables; None for an encoder of one's own.
      own: an encoder of one's own.
      epochs: where the run lies in the schedules.
      representation: which output of a network of this package is the representation.
      dtype: compute dtype.
    """

    loaded: Loaded | None
    own: Encoder | None
    epochs: Epochs
    representation: str = "features"
    dtype: str = "float32"

    @property
    def variables(self) -> PyTree:
        """Variables of the network, BatchNorm unfolded."""
        return self._network_of("it").variables

    @property
    def parts(self) -> Mapping[str, PyTree]:
        """What a published file keeps beside the encoder, such as a momentum encoder."""
        return {} if self.loaded is None else self.loaded.parts

    def encoder(self) -> Encoder:
        """The encoder in inference mode, BatchNorm unfolded."""
        if self.own is not None:
            return self.own
        loaded = self._network_of("it")
        return loading.make_encoder(
            loaded.spec, loaded.variables, loaded.config, self.representation, fold=False
        )

    def network_settings(self, method: str, group_size: int | None) -> dict[str, Any]:
        """The network in training mode with its normalisation, as MoCo's methods take them.

        Args:
          method: its name, for errors.
          group_size: images that share BatchNorm statistics; None for the whole batch.

        Raises:
          ValueError: for an encoder of one's own, or a network that cannot be told `group_size`.
        """
        loaded = self._network_of(method)
        spec = loaded.spec
        if not _takes_groups(spec):
            able = [name for name, spec in ENCODERS.items() if _takes_groups(spec)]
            raise unknown_name(f"encoder for {method}", spec.name, able)
        return {
            "network": spec.network(folded=False, group_size=group_size, **loaded.config),
            "mean": spec.mean,
            "std": spec.std,
            "dimension": loading.representation_dimensions(spec, loaded.config)["projection"],
            "group_size": group_size,
            "dtype": self.dtype,
        }

    def _network_of(self, method: str) -> Loaded:
        """The network of this package."""
        if self.loaded is None:
            assert self.own is not None
            raise UserError(
                f"Expected an encoder of this package with method {method}, which trains a network "
                f"in training mode, got {self.own.name!r}; fare, lore and simclip train "
                "any encoder."
            )
        return self.loaded


class MethodConfig(abc.ABC):
    """Settings of a training method: a frozen dataclass whose fields are flags of `train`."""

    choices: ClassVar[Registry[type[MethodConfig]]]
    """`METHODS`."""
    flag: ClassVar[str] = "method"
    """The flag that chooses among them."""
    name: ClassVar[str]
    """Its name in `METHODS`."""
    needs_init: ClassVar[bool] = False
    """Whether it cannot begin with random weights."""
    needs_random_start: ClassVar[bool] = False
    """Whether its loss has no gradient at the clean image itself, where an attack could begin."""
    takes_representation: ClassVar[bool] = False
    """Whether the flag `--representation` says anything: it trains `Start.encoder`."""

    def __post_init__(self):
        check_types(self)

    @abc.abstractmethod
    def views(self, size: tuple[int, int]) -> tuple[AugmentConfig, AugmentConfig | None]:
        """Distributions of the first view, which is attacked, and of the second, if it has one.

        Args:
          size: height and width of the views in pixels.
        """

    @abc.abstractmethod
    def make(self, start: Start) -> tuple[Method, PyTree]:
        """The method, and the variables that `init_state` gives it.

        Raises:
          ValueError: for an encoder that it cannot train, or settings out of range.
        """


def check_dtype(dtype: str) -> None:
    """Raises UserError for a dtype that training does not compute in."""
    if dtype == "float16":
        raise UserError(
            "Expected dtype float32 or bfloat16, got float16: its largest number is 65504 and its "
            "smallest 6e-8, so that gradients overflow or vanish without loss scaling, which there "
            "is none of here; bfloat16 has the range of float32 and needs none."
        )
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)


METHODS: Registry[type[MethodConfig]] = Registry("training method", "ur_jax.training_methods")
"""Settings of every training method by its name on the command line."""
MethodConfig.choices = METHODS


def register(name: str):
    """Decorates a `MethodConfig`: names it and adds it to `METHODS`."""

    def add(config: type[C]) -> type[C]:
        config.name = name
        METHODS.register(name, config)
        return config

    return add


def _takes_groups(spec: Any) -> bool:
    """Whether an encoder's network can be told how many images share statistics."""
    return "group_size" in inspect.signature(spec.network).parameters
