"""Teachers that are diffusers text-to-image pipelines, read as they declare themselves."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from onestroke.denoiser import as_wide
from onestroke.errors import InputError, read_json
from onestroke.paths import Cond, Flow, Prediction, Table, coarse
from onestroke.sampling import FewStep
from onestroke.teachers.cache import cached, digest_of
from onestroke.teachers.calls import FLOW_KEYS, Caller, clock, padded
from onestroke.teachers.dit import DiTDenoiser
from onestroke.teachers.unet import UNetDenoiser

__all__ = ["PREDICTION", "PipelineTeacher", "UNetDenoiser", "inspect_folder", "no_bars", "table_of"]

PREDICTION: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
NETWORKS = ("unet", "transformer")
READS = "text-to-image pipelines with a vae, a scheduler and a unet or a transformer, such as StableDiffusionPipeline"
WEIGHTLESS = ("tokenizer", "scheduler", "feature_extractor", "processor")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


# ---- what a folder declares ------------------------------------------------------------------------------------------


def table_of(scheduler_config: dict[str, Any]) -> Table:
    """The path that a diffusers scheduler's own config declares: betas, rescaling to zero terminal SNR and all."""
    scheduler = DDPMScheduler.from_config(scheduler_config)
    return Table(alphas_cumprod=tuple(scheduler.alphas_cumprod.double().tolist()))


def prediction_of(scheduler: str, config: dict[str, Any], source: str | Path) -> Prediction:
    """What a network under a scheduler of this class and config predicts. Raises InputError where it is unknown."""
    kind = config.get("prediction_type", "epsilon")
    if scheduler.startswith("FlowMatch") or kind == "flow_prediction":
        return "flow"
    if kind not in PREDICTION:
        raise InputError(f"{source} predicts {kind!r}; onestroke reads {', '.join(PREDICTION)}, flow_prediction.")
    made = getattr(diffusers, scheduler, None)
    if made is None or "beta_start" not in inspect.signature(made.__init__).parameters:
        raise InputError(f"{source} has a {scheduler}; onestroke reads schedulers with betas and those of flows.")
    return PREDICTION[kind]


def parts_of(cls: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline class is made of, by name."""
    return inspect.signature(cls.__init__).parameters


def class_of(name: Any, source: str | Path) -> Any:
    """The pipeline class that model_index.json names. Raises InputError for one that onestroke does not read."""
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, DiffusionPipeline):
        raise InputError(f"{source} is a {name}, which diffusers {diffusers.__version__} does not know.")
    parts = parts_of(cls)
    call = inspect.signature(cls.__call__).parameters
    drawn = {"prompt", "output_type", "num_inference_steps", "guidance_scale"} <= call.keys()
    more = {"image", "control_image", "num_frames", "mask_image"} & call.keys()
    if not drawn or more or not {"vae", "scheduler"} <= parts.keys() or len(set(NETWORKS) & parts.keys()) != 1:
        raise InputError(f"{source} is a {name}; onestroke reads {READS}.")
    return cls


def time_keyword(pipeline: type, flow: bool) -> str:
    """The keyword of a pipeline's call that takes the times of its own scheduler's kind: noise levels of a flow, whole
    timesteps of a table. Raises InputError where it has none."""
    found = "sigmas" if flow else "timesteps"
    if found not in inspect.signature(pipeline.__call__).parameters:  # type: ignore[operator]
        raise InputError(
            f"a {pipeline.__name__} takes no {found}; choose options that leave a student the usual times."
        )
    return found


def inspect_folder(folder: Path) -> None:
    """Refuse what cannot be read, from the small files alone. Raises InputError."""
    index = folder / "model_index.json"
    if not index.exists():
        raise InputError(f"{folder} is no diffusers pipeline: it has no model_index.json.")
    declared = read_json(index)
    name = declared.get("_class_name")
    cls = class_of(name, folder)
    check_libraries(declared, folder)
    for part, parameter in parts_of(cls).items():
        if part == "self" or (part not in declared and parameter.default is not parameter.empty):
            continue
        library = declared.get(part)
        if not isinstance(library, list):
            if part in declared:  # a plain value of the config
                continue
            library = [None, None]
        if library[0] is None:  # an encoder beyond the first may be left out: diffusers then feeds zeros
            if part in cls._optional_components or part[-1].isdigit() or parameter.default is not parameter.empty:
                continue
            raise InputError(f"{folder} lacks the component {part!r}, which a {name} needs.")
        if not (folder / part).is_dir():
            raise InputError(f"{folder} lacks the component {part!r}: model_index.json names it.")
        if not part.startswith(WEIGHTLESS):
            check_weights(folder / part)
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    prediction_of(str(config.get("_class_name")), config, folder)


def unreadable(source: str | Path, error: Exception) -> InputError:
    return InputError(f"teacher {str(source)!r} could not be read: {str(error).splitlines()[0]}")


def declared_in(source: str | Path) -> Mapping[str, Any]:
    """The model_index.json of a folder or of a hub id, of which that file alone is fetched. Raises InputError."""
    if isinstance(source, Path):
        return read_json(source / "model_index.json")
    try:
        declared = DiffusionPipeline.load_config(source)
    except (OSError, ValueError) as error:
        raise unreadable(source, error) from None
    class_of(declared.get("_class_name"), source)
    check_libraries(declared, source)
    return declared


def network_of(source: str | Path) -> tuple[str, Any]:
    """The name and the class of the denoiser of a pipeline. Raises InputError for a hub id that cannot be read."""
    declared = declared_in(source)
    part = next(part for part in NETWORKS if isinstance(declared.get(part), (list, tuple)))
    return part, getattr(diffusers, declared[part][1])


def hollow_network(source: str | Path) -> Any:
    """The denoiser of a folder or of a hub id, of the right shapes without storage, from its config alone.

    Raises InputError for a hub id that cannot be read.
    """
    part, cls = network_of(source)
    try:
        with no_bars(), FakeTensorMode(allow_non_fake_inputs=True):
            return cls.from_config(cls.load_config(source, subfolder=part))
    except OSError as error:
        raise unreadable(source, error) from None


def schedule_in(source: str | Path) -> tuple[Flow | Table, Prediction]:
    """The path of a folder or of a hub id and what its network predicts, from the scheduler's config alone.

    Of a flow the shift is the scheduler's own, which a pipeline may move with the size of its pictures. Raises
    InputError for a hub id that cannot be read, and for a prediction that is singular at an end of the path.
    """
    try:
        config = DDPMScheduler.load_config(source, subfolder="scheduler")
    except OSError as error:
        raise unreadable(source, error) from None
    prediction = prediction_of(str(config.get("_class_name")), config, source)
    path: Flow | Table = table_of(config) if prediction != "flow" else Flow(shift=config.get("shift", 1.0))
    try:
        path.check(prediction)
    except ValueError as error:
        raise InputError(f"teacher {str(source)!r}: {error}") from None
    return path, prediction


def check_libraries(declared: Mapping[str, Any], source: str | Path) -> None:
    """Refuse a component whose class is in no library: diffusers would run code from the folder. Raises InputError."""
    for part, entry in declared.items():
        if isinstance(entry, (list, tuple)) and entry[0] is not None:
            library, kind = entry
            known = library in ("diffusers", "transformers") or hasattr(diffusers.pipelines, library)
            if not known:
                raise InputError(f"{source}: {part!r} is a {kind} of {library}; code from a pipeline is never run.")


def check_weights(folder: Path) -> None:
    """Refuse a component without safetensors. Raises InputError."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
        found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "no weights"
        raise InputError(f"{folder} holds {found}; save the pipeline with safe_serialization=True.")
    for file in weights:
        try:
            safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} is not a safetensors file ({error}); pickles are never read: "
                "save the pipeline with safe_serialization=True."
            ) from None


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a component's tensors by name, from the heads of its safetensors files."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return found


def files_sha256(folder: Path) -> str:
    """sha256 of a teacher: its path, the tensors of its network by name, and the first rows of those of its text
    encoders, which may be many times as large. However many files they lie in, beside what variants; none is built."""
    digest, network = hashlib.sha256(coarse(schedule_in(folder)[0]).numpy().data), network_of(folder)[0]
    for part in (network, *sorted(p.name for p in folder.glob("text_encoder*"))):
        files: dict[str, Any] = {}
        for file in sorted(f for f in (folder / part).glob("*.safetensors") if "." not in f.stem):  # a variant's has
            tensors = safe_open(file, framework="pt")
            files |= dict.fromkeys(tensors.keys(), tensors)
        for name in sorted(files):
            rows = files[name].get_slice(name)
            tensor = rows[:1] if part != network and rows.get_shape() else files[name].get_tensor(name)
            digest.update(f"{part} {name} {rows.get_shape()} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- reading it ------------------------------------------------------------------------------------------------------


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep diffusers' loading bars off the terminal."""
    shown = getattr(logging, "is_progress_bar_enabled", lambda: True)()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def cuts_told_once(pipeline: Any) -> Iterator[None]:
    """One line for all prompts that are cut; the pipeline would print what it cuts from every batch."""
    log, found = getLogger(type(pipeline).__module__), set()

    def quiet(record: LogRecord) -> bool:
        if cut := "truncated" in record.getMessage():
            found.add(cut)
        return not cut

    log.addFilter(quiet)
    try:
        yield
    finally:
        log.removeFilter(quiet)
    if found:
        log.warning("Some prompts are longer than the text encoder reads: their ends are cut.")


def load_encoder(source: str | Path, part: str, name: str) -> nn.Module:
    """A transformers model of a pipeline. Raises InputError where its file lacks weights, which would be random."""
    model, report = getattr(transformers, name).from_pretrained(
        source, subfolder=part, output_loading_info=True, use_safetensors=True, dtype=torch.float32
    )
    if lost := sorted(report["missing_keys"]):
        raise InputError(f"{source}: {part!r} lacks weights ({len(lost)}, first {lost[0]!r}); save it again.")
    return model


def load_encoders(source: str | Path, declared: Mapping[str, Any]) -> dict[str, nn.Module | None]:
    """The transformers models that model_index.json declares; None for a component that it declares absent."""
    found: dict[str, nn.Module | None] = {}
    for part, entry in declared.items():
        if isinstance(entry, (list, tuple)) and entry[0] is None:
            found[part] = None
        elif isinstance(entry, (list, tuple)) and entry[0] == "transformers" and not part.startswith(WEIGHTLESS):
            found[part] = load_encoder(source, part, entry[1])
    return found


def absent(declared: Mapping[str, Any]) -> dict[str, None]:
    """The parts that model_index.json declares absent and diffusers opens only when it is told so again: None each."""
    optional = getattr(diffusers, str(declared.get("_class_name")))._optional_components
    empty = (part for part, entry in declared.items() if isinstance(entry, (list, tuple)) and entry[0] is None)
    return {part: None for part in empty if part not in optional}


def read_pipeline(source: str | Path) -> Any:
    """The pipeline in a folder or of a hub id, in float32. Raises InputError."""
    try:
        with no_bars():
            declared = declared_in(str(source))
            pipeline = DiffusionPipeline.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, **load_encoders(source, declared)
            )
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, AttributeError) as error:  # e.g. weights of other shapes
        raise unreadable(source, error) from None
    for part in ("unet", "transformer", "vae"):  # diffusers leaves missing weights on the meta device
        module = getattr(pipeline, part, None)
        lost = [name for name, p in module.named_parameters() if p.is_meta] if module is not None else []
        if lost:
            raise InputError(f"{source}: {part!r} lacks weights ({len(lost)}, first {lost[0]!r}); save it again.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class PipelineTeacher:
    """A diffusers pipeline as a teacher: a denoiser on a path, prompts to conditions, latents to images.

    Attributes: name; pipeline; net, the frozen denoiser; null, the unconditional condition; shape (C, H, W) of one
    latent; size (height, width) of a picture in pixels. `size` is given as None for the pipeline's own. Raises
    InputError for a pipeline that cannot be read, or not in this size.
    """

    def __init__(self, pipeline: Any, name: str, size: Sequence[int] | None = None, source: str | Path | None = None):
        self.pipeline, self.name, self.source, self.parked = pipeline, name, source, False
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.eval()
        self.part = next(part for part in NETWORKS if part in pipeline.components)
        config = dict(pipeline.scheduler.config)
        prediction = prediction_of(type(pipeline.scheduler).__name__, config, f"teacher {name!r}")
        self.caller = Caller(pipeline, self.part, prediction == "flow", size)
        self.call, self.shape, self._null = self.caller.learn()
        self._widest: dict[str, Tensor] = dict(self._null)
        scale = int(pipeline.vae_scale_factor)
        self.size = (self.shape[1] * scale, self.shape[2] * scale)
        path: Flow | Table = self._flow(config) if prediction == "flow" else table_of(config)
        network = getattr(pipeline, self.part)
        kind = UNetDenoiser if self.part == "unet" else DiTDenoiser
        try:
            net = kind(network, path, prediction, self.call)
        except ValueError as error:
            raise InputError(f"teacher {name!r}: {error}") from None
        self.net = net.requires_grad_(False).eval()

    def _flow(self, config: dict[str, Any]) -> Flow:
        """The path of a flow teacher: its scheduler's shift in this size. One that re-noises is a few-step student's:
        its times are its own, where the pipeline leaves them to it."""
        shift, self.spaced = self.caller.shift()
        terminal = config.get("shift_terminal") or 0.0
        own = self.spaced and (terminal or config.get("stochastic_sampling"))
        return Flow(shift=shift, terminal=terminal if own else None, num_timesteps=config["num_train_timesteps"])

    @classmethod
    def load(cls, source: str | Path, name: str | None = None, size: Sequence[int] | None = None) -> PipelineTeacher:
        """From a folder or a hub id. Raises InputError as `load_teacher`."""
        if isinstance(source, Path):
            inspect_folder(source)
        return cls(read_pipeline(source), name or str(source), size, source)

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's parts by name."""
        return dict(self.pipeline.components)

    @property
    def path(self) -> Flow | Table:
        return self.net.path

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device | str) -> PipelineTeacher:
        self.restore()
        self.pipeline.to(device)
        return self

    # ---- prompts -------------------------------------------------------------------------------------------------

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders by name."""
        return {k: m for k, m in self.components.items() if k.startswith("text_encoder") and isinstance(m, nn.Module)}

    def park(self) -> None:
        """Let the text encoders leave memory. What needs them brings them back from where the pipeline was read."""
        if self.source is not None:
            assert self.identity  # needs them
            for module in self.encoders.values():
                module.to("meta")
            self.parked = True

    def restore(self) -> None:
        """Read the text encoders again, if they have left memory."""
        if self.parked:
            assert self.source is not None
            with no_bars():
                found = {k: load_encoder(self.source, k, type(m).__name__) for k, m in self.encoders.items()}
            self.pipeline.register_modules(**{k: m.to(self.device) for k, m in found.items()})
            self.parked = False

    @property
    def null(self) -> Cond:
        """The unconditional condition, as long as the longest that was encoded."""
        return as_wide(self._null, self._widest)

    @cached_property
    def identity(self) -> str:
        """What conditions depend on beside the prompts: a digest of encoders, tokenizers and how they are called."""
        return digest_of(
            {k: m for k, m in self.components.items() if k.startswith(("text_encoder", "tokenizer"))},
            pipeline=type(self.pipeline).__name__,
            diffusers=diffusers.__version__,
            network=dict(getattr(self.pipeline, self.part).config),
            call=self.caller.keywords(),
            size=self.size,
        )

    @torch.no_grad()
    def encode(self, prompts: list[str], batch_size: int = 64) -> Cond:
        """Prompts -> (N, ...) each of what the network reads of them, as the pipeline itself calls it; every distinct
        prompt once."""
        self.restore()
        distinct = list(dict.fromkeys(prompts))
        with cuts_told_once(self.pipeline):
            parts = [
                self.caller.encode(self.call, distinct[i : i + batch_size]) for i in range(0, len(distinct), batch_size)
            ]
        found = {k: padded([row for part in parts for row in part[k]]) for k in parts[0]}
        return self._spread(found, distinct, prompts)

    def conditions(self, prompts: list[str]) -> Cond:
        """As `encode`, but kept on disk for the next run with the same prompts and encoders; on the CPU."""
        distinct = list(dict.fromkeys(prompts))
        key = digest_of({}, teacher=self.identity, prompts=distinct)
        return self._spread(cached(key, lambda: dict(self.encode(distinct))), distinct, prompts)

    def _spread(self, found: dict[str, Tensor], distinct: list[str], prompts: list[str]) -> Cond:
        """The rows of the distinct prompts for all of them, as long as the null condition."""
        found = as_wide(found, self._null)
        self._widest = {k: v[:1] for k, v in as_wide(self._widest, found).items()}
        rows = {p: i for i, p in enumerate(distinct)}
        return {k: v[torch.tensor([rows[p] for p in prompts])] for k, v in found.items()}

    # ---- pictures ------------------------------------------------------------------------------------------------

    @cached_property
    def video(self) -> bool:
        """Whether the autoencoder is one of videos, (B, C, frames, H, W)."""
        return self.call.order is not None and self._packed(torch.zeros(1, *self.shape)).ndim == 5

    def _packed(self, x0: Tensor) -> Tensor:
        """Latents (B, C, H, W) of a pipeline that packs them, in the form that its decoder takes."""
        return self.pipeline._unpack_latents(self.call.pack(x0), *self.size, self.pipeline.vae_scale_factor)

    def _scaling(self, z: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """(factor, shift) of the autoencoder, for all or each channel of z (B, C, ...): x0 = factor (z - shift)."""
        config = self.pipeline.vae.config

        def per_channel(name: str, default: float) -> float | Tensor:
            value = config.get(name)
            return z.new_tensor(value).view(1, -1, *[1] * (z.ndim - 2)) if value else default

        factor = (config.get("scaling_factor") or 1.0) / per_channel("latents_std", 1.0)
        return factor, per_channel("latents_mean", 0.0) + (config.get("shift_factor") or 0.0)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H', W') in [0, 1] -> latents x0 (B, C, H, W), without the autoencoder's own noise."""
        if tuple(images.shape[2:]) != tuple(self.size):
            raise InputError(f"images must have {self.size} pixels, not {tuple(images.shape[2:])}.")
        vae = self.pipeline.vae
        pixels = images.to(vae.device, vae.dtype) * 2 - 1
        out = vae.encode(pixels[:, :, None] if self.video else pixels)
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else next(iter(out.values()))
        factor, shift = self._scaling(z)
        x0 = ((z - shift) * factor).float()
        return x0[:, :, 0] if self.video else x0

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, H', W') in [0, 1]."""
        return self.picture(x0)

    def picture(self, x0: Tensor) -> Tensor:
        """`decode` with gradient."""
        z = x0.to(next(self.pipeline.vae.parameters()))
        z = z if self.call.order is None else self._packed(z)
        factor, shift = self._scaling(z)
        images = self.pipeline.vae.decode(z / factor + shift, return_dict=False)[0]
        images = images[:, :, 0] if self.video else images
        return images.to(torch.promote_types(images.dtype, torch.float32)).div(2).add(0.5).clamp(0, 1)

    @torch.no_grad()
    def draw(self, noise: Tensor, prompts: list[str], steps: int, guidance_scale: float) -> Tensor:
        """The pipeline's own sampler from `noise` (B, C, H, W) -> images (B, 3, H', W') in [0, 1]."""
        self.restore()
        latents = noise if self.call.order is None else self.call.pack(noise)
        out = self.pipeline(
            list(prompts),
            num_inference_steps=steps,
            latents=latents,
            output_type="pt",
            **self.caller.keywords(guidance_scale, len(prompts)),
        )
        return out.images.float()

    # ---- students ------------------------------------------------------------------------------------------------

    def plain_call(self, few: FewStep) -> dict[str, Any]:
        """The keyword arguments with which the plain pipeline draws what a student of this teacher draws."""
        own = {} if few.gridded else self.own_times(few)
        return {"num_inference_steps": len(few.times), **own, **self.caller.keywords()}

    def own_times(self, few: FewStep) -> dict[str, list[float]]:
        """The keyword argument that gives the pipeline `few`'s times. Raises InputError where it takes none."""
        flow = isinstance(self.path, Flow)
        times = clock(self.path, torch.tensor(few.times, dtype=torch.float64)).round().to(torch.int64).tolist()
        return {time_keyword(type(self.pipeline), flow): list(few.times) if flow else times}

    def student_pipeline(self, net: nn.Module, few: FewStep) -> Any:
        """The ordinary pipeline that draws as `few.sample(net, ...)` does: its scheduler carries the times."""
        self.restore()
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(**{self.part: getattr(net, self.part), "scheduler": self.student_scheduler(few)})
        return pipeline

    def student_scheduler(self, few: FewStep) -> Any:
        """The scheduler that calls a network as `few` does; of times that are its own, when the pipeline is called by
        `plain_call`. Raises InputError where there is none."""
        steps, path, config = len(few.times), self.path, self.pipeline.scheduler.config
        other = few.renoise == "fixed" or (few.renoise == "fresh" and (few.eta < 1 or not few.gridded))
        if few.start != "unit" or (steps > 1 and other):
            raise InputError(
                f"times {few.times} from {few.start!r} noise, then {few.renoise!r}, have no standard scheduler."
            )
        if not few.gridded and self.own_times(few):
            return told_times(config, isinstance(path, Flow))
        if isinstance(path, Table):
            plain = {"clip_sample": False, "thresholding": False}
            if few.renoise == "implied":
                check_grid(path, few)
                return DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True, **plain)
            origin = 8 if 8 % steps == 0 and path.num_timesteps % 8 == 0 else steps
            return LCMScheduler.from_config(config, original_inference_steps=origin, **plain)
        kept = {k: v for k, v in config.items() if k in FLOW_KEYS} | {"stochastic_sampling": few.renoise == "fresh"}
        if not self.spaced:
            return FlowMatchEulerDiscreteScheduler(**{"shift": path.shift, **kept})
        kept |= {"use_dynamic_shifting": False, "stochastic_sampling": steps == 1 or few.renoise == "fresh"}
        own = path if steps == 1 or path.terminal is not None else stretched(path, steps)
        return FlowMatchEulerDiscreteScheduler(**{**kept, "shift": own.shift, "shift_terminal": own.terminal or None})


def check_grid(path: Flow | Table, few: FewStep) -> None:
    """Refuse a number of DDIM steps that a table of times is no multiple of. Raises InputError."""
    steps = len(few.times)
    if isinstance(path, Table) and few.gridded and few.renoise == "implied" and path.num_timesteps % steps:
        raise InputError(f"renoise=implied needs a number of steps that divides {path.num_timesteps}, not {steps}.")


def told_times(config: Mapping[str, Any], flow: bool) -> Any:
    """The scheduler of DDIM steps, which are Euler's of a flow, between the times that it is told.

    A table that ends without signal is written out, its last entry the least that float32 knows: the scheduler's own is
    2^-24, from whose square root a first step would differ.
    """
    if flow:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config["num_train_timesteps"])
    ddim: dict[str, Any] = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    if config.get("rescale_betas_zero_snr"):
        betas = DDPMScheduler.from_config(config).betas.clamp_max(1 - torch.finfo(torch.float32).eps / 2)
        ddim |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    return DPMSolverMultistepScheduler.from_config(config, thresholding=False, **ddim)


def stretched(path: Flow, steps: int) -> Flow:
    """The flow whose scheduler, spacing `steps` times by itself from 1 to its smallest, takes those of `path`'s grid.

    Shifts are Moebius maps that keep 0 and 1, and so is the map between the two spacings up to stretching: one shift
    makes them equal.
    """
    wanted, shift, low = path.grid(steps), path.shift, 1 / path.num_timesteps
    for _ in range(50):
        low = Flow(shift=shift).shifted(1 / path.num_timesteps)
        slope = (steps - 1) / (steps * (1 - low))
        shift = 1 + (path.shift - 1) * slope / (1 + (path.shift - 1) * (1 / steps - low * slope))
    found = Flow(shift=shift, terminal=wanted[-1], num_timesteps=path.num_timesteps)
    if max(abs(a - b) for a, b in zip(found.grid(steps), wanted, strict=True)) > 1e-6:
        raise InputError(f"the times {wanted} have no standard scheduler.")
    return found
