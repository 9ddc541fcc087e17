"""Checkpoints of Stable Diffusion 1.x, 2.x and XL, read and written: a single file, or a folder of diffusers.

    sd = load_checkpoint("sd21.safetensors")        the architecture is read from the tensors' shapes
    save_checkpoint(sd, "mine.safetensors")         in the layout that was read, with its extra tensors

Follow load_checkpoint, at the end: it opens the file, finds out what its network predicts, builds an empty model,
matches every tensor by name and shape, and fills it.
"""
import hashlib
import itertools
import math
import re
import sys
import zipfile
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch

from model import Config, StableDiffusion
from support.files import from_json, open_tensors, read_text, reading, save_tensors
from support.names import HF_CLIP, OPEN_CLIP, UNET, VAE, XL_CLIP, file_names, folder_names

TEXT_PREFIXES = {  # of the text encoder in single files -> its first tensor
    OPEN_CLIP: "token_embedding.weight",
    "conditioner.embedders.0.model.": "token_embedding.weight",                     # SD 2.x in Stability's newer code
    HF_CLIP: "embeddings.token_embedding.weight",
    XL_CLIP[0]: "embeddings.token_embedding.weight",                                # SDXL, of two
    "cond_stage_model.transformer.": "embeddings.token_embedding.weight",           # SD 1.x, older merges
}
PARTS = {"UNet": UNET, "autoencoder": VAE, "text encoder": ("cond_stage_model.", "conditioner.")}
NETWORK = re.compile(  # an unknown tensor with such a name is an error; any other extra tensor is kept
    r"model\.diffusion_model\.|first_stage_model\.(encoder|decoder|(post_)?quant_conv)\."
    r"|(cond_stage_model|conditioner\.embedders\.[01])\.(model|transformer(\.text_model)?)\."
    r"(token_embedding|positional_embedding|transformer\.resblocks|ln_final|embeddings|encoder|final_layer_norm)\b"
    r"|unet/|vae/|text_encoder(_2)?/(embeddings|encoder|final_layer_norm)")
NEEDED = "Stable Diffusion 1.x, 2.x or XL is needed"
OTHERS = [  # (pattern of a tensor's name, what a file with it is)
    (r"conditioner\.embedders\.\d\.open_clip\.|embedder\.|noise_augmentor\.|.*time_stack\.",
     "an unCLIP or a video model"),
    (r"edm_mean$|edm_std$", "Playground 2.5 (EDM, other latents)"),
    (r"edm_vpred\.sigma_max$", "CosXL (EDM, another noise schedule)"),
    (UNET.replace(".", r"\.") + "joint_blocks", "Stable Diffusion 3")]
DISTILLED = re.compile(r"(?<![a-z])(turbo|lightning|lcm|hyper|dmd2?)(?![a-z])", re.IGNORECASE)
USUAL_EXTRA = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|logvar|lvlb_weights"
    r"|.*(logit_scale|position_ids|attn_mask)|model_ema\.(decay|num_updates)")
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def in_batches(names):
    """Yield lists of 64 names. The file is opened again for each, so that the OS can drop the pages that were read."""
    names = iter(names)
    while batch := list(itertools.islice(names, 64)):
        yield batch


def read_safetensors(path, names):
    """Yield (name, tensor)."""
    for batch in in_batches(names):
        with open_tensors(path) as file:
            yield from ((name, file.get_tensor(name)) for name in batch)


def is_plain(tensor):
    """Whether a tensor from a pickle is an ordinary one, not sparse, quantised or without memory."""
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


class Inert:
    """Stands for a class or function that a pickle names: it takes any arguments and does nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


INERT = ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.dtype", "numpy.ndarray"] + [
    f"numpy.{core}.{name}" for core in ("core", "_core")                        # numpy 1 and 2
    for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")]


class CheckpointFile:
    """A single file, open: .shapes by name, .metadata, .config, .names(parameter), .tensors(names) one by one."""

    def __init__(self, path):
        self.path, self.metadata, self.pickled = Path(path), {}, None
        if self.path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth"):
            raise ValueError(f"{path}: expected a .safetensors or .ckpt file, or a diffusers folder")
        if self.path.suffix == ".safetensors":
            with open_tensors(self.path) as file:
                self.metadata = file.metadata() or {}
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        else:
            self.shapes = self.read_pickle()
        try:
            self.text_prefix, self.config = find_text(self.shapes), read_config(self.shapes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def read_pickle(self):
        try:
            content = self.unpickle()
        except Exception as error:  # damaged bytes can raise anything in a parser
            if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise ValueError(f"{self.path}: refused, since it holds {foreign[1]}, which could run code; "
                                 "look for a .safetensors version") from error
            raise ValueError(f"{self.path}: cannot be read; truncated or not a checkpoint? "
                             f"({type(error).__name__})") from error
        self.pickled = None if zipfile.is_zipfile(self.path) else content  # older pickles cannot be mapped
        return {name: tuple(tensor.shape) for name, tensor in content.items()}

    def unpickle(self):
        """Load with weights_only=True. Lightning's callback and numpy's numbers, which old files contain beside the
        weights, become Inert."""
        with torch.serialization.safe_globals([(Inert, name) for name in INERT]):
            content = torch.load(self.path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path) or None)
        content = content.get("state_dict", content) if isinstance(content, dict) else {}
        return {name: tensor.detach() for name, tensor in content.items()
                if isinstance(name, str) and isinstance(tensor, torch.Tensor) and is_plain(tensor)}

    def tensors(self, names):
        if self.path.suffix == ".safetensors":
            yield from read_safetensors(self.path, names)
            return
        for batch in in_batches(names):
            content = self.pickled or self.unpickle()
            yield from ((name, content[name]) for name in batch)

    def names(self, parameter):
        return file_names(parameter, self.text_prefix)


MARIGOLD = {  # the metadata of its folders: what its pipeline in diffusers does
    "task": "depth", "image_input": "first", "empty_prompt": "unpadded", "resolution": "576 768"}


class DiffusersFolder:
    """A folder in diffusers' layout: model_index.json, unet/, vae/, text_encoder/, scheduler/. Used as
    CheckpointFile."""

    def __init__(self, path):
        self.path, self.shapes, self.places = Path(path), {}, {}
        pipeline = self.json("model_index.json").get("_class_name")
        if not re.fullmatch(r"StableDiffusion(XL)?(Img2Img|Inpaint)?Pipeline|Marigold(Depth)?Pipeline", str(pipeline)):
            raise ValueError(f"{path}: a folder of {pipeline}; {NEEDED}")
        if "XL" in pipeline and not (self.path / "text_encoder").is_dir():
            raise ValueError(f"{path}: this looks like the SDXL refiner; {NEEDED}")
        for part in ("unet", "vae", "text_encoder", *["text_encoder_2"] * ("XL" in pipeline)):
            for file in self.weight_files(part):
                self.read_names(part, file)
        self.config, scheduler = self.read_config(), self.json("scheduler/scheduler_config.json")
        self.metadata = {"prediction_type": str(scheduler.get("prediction_type", "epsilon")),      # diffusers' default
                         "zero_snr": str(scheduler.get("rescale_betas_zero_snr", False)).lower()}
        if "Marigold" in pipeline:
            self.metadata |= MARIGOLD
        betas = tuple(scheduler.get(name) for name in ("beta_schedule", "beta_start", "beta_end"))
        if betas != ("scaled_linear", 0.00085, 0.012):
            raise ValueError(f"{path}: the noise schedule of its scheduler is {betas}, not Stable Diffusion's")

    def json(self, name):
        with reading(self.path / name, "JSON as diffusers writes it"):
            return dict(from_json(read_text(self.path / name)))

    def weight_files(self, part):
        """-> the files of one variant, sharded or not: the plain variant if there is one, else fp16."""
        variants = {}
        for file in sorted((self.path / part).glob("*.safetensors")):
            stem = re.sub(r"-\d+-of-\d+", "", file.stem)
            variants.setdefault(stem.partition(".")[2], []).append(file)
        if not variants:
            raise ValueError(f"{self.path}: {part}/ is missing or has no .safetensors file (.bin files are not read)")
        return variants[min(variants)]

    def read_names(self, part, path):
        with open_tensors(path) as file:
            for stored in file.keys():
                name = f"{part}/{stored.removeprefix('text_model.')}"
                for old, new in OLD_VAE_NAMES.items():
                    name = name.replace(old, new)
                self.places[name], self.shapes[name] = (path, stored), tuple(file.get_slice(stored).get_shape())

    def read_config(self):
        """-> Config, from the tensors' shapes. config.json files say which text encoder it is and how many heads."""
        def count(pattern):
            return count_names(self.shapes, pattern)

        shapes, levels = self.shapes, count(r"unet/down_blocks\.\d+\.")
        embedding = shapes["text_encoder/embeddings.token_embedding.weight"]
        pooled = shapes.get("text_encoder_2/text_projection.weight", [0])[0]
        config = Config(
            unet_widths=tuple(shapes[f"unet/down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)),
            unet_res_blocks=count(r"unet/down_blocks\.0\.resnets\.\d+\."),
            transformer_depth=tuple(count(rf"unet/down_blocks\.{i}\.attentions\.0\.transformer_blocks\.\d+\.")
                                    for i in range(levels)),
            context_width=shapes["unet/mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
            linear_projection=len(shapes["unet/mid_block.attentions.0.proj_in.weight"]) == 2,
            in_channels=shapes["unet/conv_in.weight"][1], out_channels=shapes["unet/conv_out.weight"][0],
            vae_widths=tuple(shapes[f"vae/encoder.down_blocks.{i}.resnets.0.conv1.weight"][0]
                             for i in range(count(r"vae/encoder\.down_blocks\.\d+\."))),
            vae_res_blocks=count(r"vae/encoder\.down_blocks\.0\.resnets\.\d+\."),
            latent_channels=shapes["vae/quant_conv.weight"][0] // 2,
            open_clip=self.json("text_encoder/config.json").get("hidden_act") == "gelu",
            text_width=embedding[1], text_layers=count(r"text_encoder/encoder\.layers\.\d+\."), text_projection=False,
            vocabulary=embedding[0], pooled_width=pooled, pooled_layers=count(r"text_encoder_2/encoder\.layers\.\d+\."))
        heads = self.json("unet/config.json").get("attention_head_dim")
        heads = heads if isinstance(heads, list) else [heads] * levels
        if heads != [config.heads(width) for width in config.unet_widths]:
            raise ValueError(f"{self.path}: {heads} attention heads are not those of Stable Diffusion {config.version}")
        scale = self.json("vae/config.json").get("scaling_factor", 0.18215)
        if scale != config.latent_scale:
            raise ValueError(f"{self.path}: its autoencoder scales latents by {scale}, Stable Diffusion "
                             f"{config.version}'s by {config.latent_scale}")
        if config.text_layers_used < config.text_layers:
            raise ValueError(f"{self.path}: a text encoder of {config.text_layers} layers, where SD 2.x has 23")
        return config

    def tensors(self, names):
        names = sorted(names, key=self.places.get)
        for path, group in itertools.groupby(names, lambda name: self.places[name][0]):
            name_of = {self.places[name][1]: name for name in group}
            for stored, tensor in read_safetensors(path, name_of):
                yield name_of[stored], tensor.T if stored == "text_projection.weight" else tensor

    def names(self, parameter):
        return folder_names(parameter, self.config)


def open_checkpoint(path):
    """-> CheckpointFile or DiffusersFolder. ValueError that says what to pass instead."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        return DiffusersFolder(path)
    if path.is_dir():
        above = "; pass its parent folder" if (path.parent / "model_index.json").is_file() else ""
        raise ValueError(f"{path}: a folder without model_index.json, so not a diffusers pipeline{above}")
    if path.is_file():
        return CheckpointFile(path)
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and path.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"{path}: no such checkpoint file or folder. If it is a model's name on the Hugging Face hub, "
                         f"download it first: hf download {path} --local-dir {path.name}; then --ckpt {path.name}")
    raise ValueError(f"{path}: no such checkpoint file")


def looks_like(shapes):
    """A guess at what a file is that has no part of Stable Diffusion."""
    hints = {
        "lora_": "a LoRA file: pass it as --lora, with the checkpoint it was made for",
        "down_blocks.": "one part of a diffusers folder: pass the whole folder",
        "double_blocks": "Flux", "control_model.": "a ControlNet", "encoder.down": "an autoencoder alone",
        "input_blocks.": "a UNet alone, without autoencoder and text encoder", "text_model.": "a text encoder alone",
        "resblocks.": "a text encoder alone",
    }
    found = (what for hint, what in hints.items() if any(hint in name for name in shapes))
    return next(found, f"an unknown file of {len(shapes)} tensors")


def check_parts(shapes):
    """ValueError if a single file is something else, or lacks a part of Stable Diffusion."""
    for pattern, what in OTHERS:
        if any(re.match(pattern, name) for name in shapes):
            raise ValueError(f"this looks like {what}; {NEEDED}")
    if UNET + "label_emb.0.0.weight" in shapes and XL_CLIP[1] + "ln_final.weight" not in shapes:
        what = "an SDXL without its second text encoder, or an unCLIP"
        if "conditioner.embedders.0.model.ln_final.weight" in shapes:
            what = "the SDXL refiner"
        raise ValueError(f"this looks like {what}; {NEEDED}")
    missing = [part for part, prefix in PARTS.items() if not any(name.startswith(prefix) for name in shapes)]
    if len(missing) == len(PARTS):
        raise ValueError(f"this looks like {looks_like(shapes)}; {NEEDED}")
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}; a whole checkpoint of {NEEDED}")


def find_text(shapes):
    """-> the prefix of the text encoder's tensors in a single file."""
    return next((prefix for prefix, first in TEXT_PREFIXES.items() if prefix + first in shapes), HF_CLIP)


def count_names(names, pattern):
    """-> how many different beginnings of `names` match a pattern."""
    return len({match[0] for name in names if (match := re.match(pattern, name))})


def read_config(shapes):
    """{name: shape} of a single file -> Config. ValueError that says what the file looks like."""
    def count(pattern):
        return count_names(shapes, pattern)

    check_parts(shapes)
    try:
        widths, depth, downsamplers = [], [], []
        blocks = count(re.escape(UNET) + r"input_blocks\.\d+\.")
        for i in range(1, blocks):
            block = f"{UNET}input_blocks.{i}."
            if block + "0.op.weight" in shapes:
                downsamplers.append(i)
            elif len(widths) == len(downsamplers):  # the first block of a level
                widths.append(shapes[block + "0.in_layers.2.weight"][0])
                depth.append(count(re.escape(block) + r"1\.transformer_blocks\.\d+\."))
        prefix = find_text(shapes)
        open_clip, embedding = prefix.endswith(".model."), shapes[prefix + TEXT_PREFIXES[prefix]]
        projection = shapes[UNET + "middle_block.1.proj_in.weight"]
        levels = count(re.escape(VAE) + r"encoder\.down\.\d+\.")
        return Config(
            unet_widths=tuple(widths), unet_res_blocks=(downsamplers or [blocks])[0] - 1,
            transformer_depth=tuple(depth),
            context_width=shapes[UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
            linear_projection=len(projection) == 2,
            in_channels=shapes[UNET + "input_blocks.0.0.weight"][1], out_channels=shapes[UNET + "out.2.weight"][0],
            vae_widths=tuple(shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
            vae_res_blocks=count(re.escape(VAE) + r"encoder\.down\.0\.block\.\d+\."),
            latent_channels=shapes[VAE + "quant_conv.weight"][0] // 2,
            open_clip=open_clip, text_width=embedding[1], vocabulary=embedding[0],
            text_projection=open_clip and prefix + "text_projection" in shapes,
            text_layers=count(re.escape(prefix) + (r"transformer\.resblocks\.\d+\." if open_clip
                                                   else r"encoder\.layers\.\d+\.")),
            pooled_width=shapes.get(XL_CLIP[1] + "ln_final.weight", [0])[0],
            pooled_layers=count(re.escape(XL_CLIP[1]) + r"transformer\.resblocks\.\d+\."))
    except (KeyError, IndexError) as error:
        raise ValueError(f"this looks like an incomplete checkpoint; {NEEDED} (no tensor {error})") from error


def prediction_of(metadata):
    """-> (prediction, metadata key it came from), or (None, None)."""
    words = {"v_prediction": "v", "epsilon": "eps"}
    names = "prediction", "modelspec.prediction_type", "modelspec.predict_key", "prediction_type"
    return next(((words.get(metadata[name], metadata[name]), name) for name in names if name in metadata), (None, None))


def guess_prediction(file, prediction):
    """-> ("v" or "eps", why): the given one, else the file's metadata, else a guess from the weights."""
    found, why = prediction, "as asked"
    if found is None and "prediction" not in file.metadata and "v_pred" in file.shapes:
        found, why = "v", "from the file's tensor v_pred"       # which ComfyUI reads; others may have left "epsilon"
    if found is None:
        found, name = prediction_of(file.metadata)
        why = f"from the file's {name}"
    yaml = file.path.with_suffix(".yaml")               # the settings of the original code, which A1111 reads
    if found is None and yaml.is_file():
        text = yaml.read_text(encoding="utf-8", errors="replace")
        if line := re.search(r"""^\s*parameterization:\s*["']?(\w+)""", text, re.MULTILINE):
            found, why = line[1], f"from the parameterization in {yaml.name}"
    if found not in (None, "v", "eps"):
        raise ValueError(f"{file.path}: prediction {found!r} ({why}) is neither 'v' nor 'eps'")
    if found is not None:
        return found, why
    config = file.config
    if config.is_xl:
        return "eps", "SDXL is, unless it has the tensor v_pred; if this one is not: --prediction v"
    if not config.open_clip:
        return "eps", "SD 1.x usually is eps; if this one is not: --prediction v"
    # one norm's statistics separate SD 2.1 (768, v) from the eps-models with the same shapes
    last = len(config.unet_widths) * (config.unet_res_blocks + 1) - 1
    name = f"{UNET}output_blocks.{last}.1.transformer_blocks.0.norm1.bias"
    if name not in file.shapes:
        return "v", "the default of SD 2.x; --prediction eps overrides it"
    (_, bias), = file.tensors([name])
    std = bias.float().std().item()
    why = f"guessed from a norm's std, {std:.3f}: v if above 0.09; --prediction overrides it"
    return "v" if std > 0.09 else "eps", why


def check_architecture(file):
    """ValueError if a file's architecture is not supported."""
    config = file.config
    entries = [entry for name, entry in vars(config).items() if not name.startswith(("transformer_", "pooled_"))]
    numbers = [number for entry in entries for number in (entry if isinstance(entry, tuple) else [entry])
               if not isinstance(number, bool)]
    if not all(1 <= number < 10**6 for number in numbers) or not config.unet_widths or not config.vae_widths:
        raise ValueError(f"{file.path}: its tensors have impossible sizes, or a network has no blocks: {numbers}")
    if config.in_channels not in (config.latent_channels, 2 * config.latent_channels):
        raise ValueError(f"{file.path}: the UNet takes {config.in_channels} channels: an inpainting, depth or "
                         "upscaling variant, which is not supported")
    is_depth = file.metadata.get("task") == "depth" or file.metadata.get("image_input") == "first"
    if config.in_channels > config.latent_channels and not is_depth:
        raise ValueError(f"{file.path}: the UNet takes {config.in_channels} channels, and neither its metadata nor the "
                         "layout of Marigold says that it is a depth model: InstructPix2Pix, or a depth model of "
                         "another program, which is not supported")
    if config.vocabulary < 49408 or config.text_width + config.pooled_width != config.context_width:
        raise ValueError(f"{file.path}: a text encoder of {config.vocabulary} words and width {config.text_width} does "
                         f"not fit the tokenizer's 49408 and the UNet's context width {config.context_width}")
    if config.linear_projection and not config.open_clip and not config.is_xl:
        raise ValueError(f"{file.path}: the UNet is an SD 2.x, the text encoder has the names of an SD 1.x")


def build_empty(file, prediction):
    """-> StableDiffusion on the meta device: tensors with shapes, without memory."""
    import open_clip  # noqa: F401  before the meta device: some versions compute while they are imported
    with torch.device("meta"):
        return StableDiffusion(file.config, prediction)


def averaged_name(name):
    """The name of a UNet tensor's EMA in a non-pruned file."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def find_tensors(file, sd, use_ema):
    """-> {parameter of `sd`: names of its tensors in the file}, and the names of all extra tensors.

    ValueError if a tensor is missing, has the wrong shape, or is unknown inside one of the networks.
    """
    averaged = {averaged_name(name) for name in sd.state_dict() if name.startswith(UNET)}
    if use_ema and not averaged & file.shapes.keys():
        raise ValueError(f"{file.path}: it has no EMA weights; leave --use-ema out")
    plain = {parameter: file.names(parameter) for parameter in sd.state_dict()}
    stored = {parameter: [averaged_name(name) if use_ema and name.startswith(UNET) else name for name in names]
              for parameter, names in plain.items()}
    wanted = {name for names in stored.values() for name in names}
    known = wanted | averaged | {name for names in plain.values() for name in names}
    missing, extra = sorted(wanted - file.shapes.keys()), sorted(file.shapes.keys() - known)
    unknown = [name for name in extra if NETWORK.match(name) and not USUAL_EXTRA.fullmatch(name)]
    if missing or unknown:
        raise ValueError(f"{file.path}: not quite a Stable Diffusion {sd.config.version} checkpoint: "
                         f"{len(missing)} tensors missing{', first ' + missing[0] if missing else ''}; "
                         f"{len(unknown)} unknown{', first ' + unknown[0] if unknown else ''}")
    for parameter, tensor in sd.state_dict().items():
        expected = (len(tensor) // len(stored[parameter]), *tensor.shape[1:])
        for name in stored[parameter]:
            if file.shapes[name] != expected and file.shapes[name] + (1, 1) != expected:   # diffusers: linear
                raise ValueError(f"{file.path}: {name} is {file.shapes[name]}, "
                                 f"expected {expected} from the other tensors")
    return stored, extra


def is_finite(tensor):
    """Whether a tensor has neither NaN nor infinity, in one pass and without a temporary of its size."""
    low, high = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()        # both are NaN if any is
    return math.isfinite(low) and math.isfinite(high)


def hash_of(network):
    """A hash of the first 1024 numbers of each tensor of a network."""
    words = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        words.update(name.encode() + tensor.flatten()[:1024].float().cpu().numpy().tobytes())
    return words.hexdigest()


def read_weights(file, sd, stored, device, dtype):
    """Fill `sd` with the file's tensors, read one by one -> their dtypes in the file, {parameter: dtype}.

    Sets sd.unet_hash, of the first 1024 numbers of each UNet tensor in float16: equal for fp32 and fp16 files of a
    model.
    """
    parameter_of = {name: parameter for parameter, names in stored.items() for name in names}
    read, state, hashes, dtypes = {}, {}, {}, {}
    for name, tensor in file.tensors(parameter_of):
        parameter = parameter_of[name]
        if not tensor.is_floating_point() or not is_finite(tensor):
            raise ValueError(f"{file.path}: {name} is not floating point, or has NaN or infinity: get another copy")
        dtypes[parameter] = tensor.dtype
        if parameter.startswith(UNET):
            hashes[parameter] = hashlib.sha256(tensor.flatten()[:1024].half().numpy()).hexdigest()
        read[name] = tensor.to(device=device, dtype=dtype)
    for parameter, empty in sd.state_dict().items():
        tensors = [read.pop(name) for name in stored[parameter]]    # q, k and v of SD 1.x become one matrix
        state[parameter] = (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).view(empty.shape)
    sd.load_state_dict(state, assign=True)
    sd.unet_hash = hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()
    sd.unet.embeddings_to(torch.promote_types(dtype, torch.float32))
    for tower in sd.text_encoders:
        tower.attn_mask = torch.full((77, 77), float("-inf"), device=device).triu(1)
    return dtypes


# ------------------------------------------------------------------ saving

@dataclass
class Source:
    """The file a StableDiffusion was read from, for saving it in the same layout."""
    path: Path | None = None
    text_prefix: str | None = None              # None: the usual one
    extra: dict = field(default_factory=dict)   # {name: tensor} of no network
    dtypes: dict = field(default_factory=dict)  # {parameter: dtype in the file}


def modelspec(sd, title, size, kind=""):
    """The metadata that other tools read (the ModelSpec standard). size: [height, width] in pixels; kind: "/lora" for a
    LoRA file. The license is for the user to add."""
    depth = "-depth" if sd.is_depth_model else ""
    name = {"1.x": "v1", "2.x": "v2-768-v" if sd.prediction == "v" else "v2-512", "XL": "xl-v1-base"}[sd.config.version]
    return {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"stable-diffusion-{name}{depth}{kind}",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.title": title, "modelspec.date": f"{datetime.now():%Y-%m-%dT%H:%M:%S}",
            "modelspec.resolution": f"{size[1]}x{size[0]}",
            "modelspec.prediction_type": "v" if sd.prediction == "v" else "epsilon"}


def save_checkpoint(sd, path, dtype=None, **metadata):
    """Write one .safetensors file in the layout that was read. dtype: of the networks (None: as in that file)."""
    source = sd.source or Source()
    tensors = dict(source.extra)
    prefix = source.text_prefix or (OPEN_CLIP if sd.config.open_clip else HF_CLIP)
    for parameter, value in sd.state_dict().items():
        names = file_names(parameter, prefix)
        value = value.to(dtype or source.dtypes.get(parameter, value.dtype))
        tensors.update(zip(names, value.chunk(len(names))))
    if sd.config.is_xl:                                     # for ComfyUI, which reads no metadata
        tensors |= {"v_pred": torch.zeros(0)} if sd.prediction == "v" else {}
        tensors |= {"ztsnr": torch.zeros(0)} if sd.zero_snr else {}
    needed = {"prediction": sd.prediction} | ({"zero_snr": "true"} if sd.zero_snr else {}) | (
        {"image_input": "first"} if sd.is_depth_model else {})
    save_tensors(path, tensors, {**sd.metadata, **needed, **metadata})


# ------------------------------------------------------------------ loading

def load_checkpoint(path, device="cpu", dtype=torch.float32, prediction=None, use_ema=False, zero_snr=False):
    """Read Stable Diffusion 1.x, 2.x or XL, a single file (.safetensors or .ckpt) or a diffusers folder ->
    StableDiffusion.

    prediction: "v" or "eps" (None: from the file, or guessed); use_ema: load the UNet's EMA weights from a non-pruned
    file; zero_snr: the network was trained with zero terminal SNR, though the file does not say so. Prints what it
    assumed. ValueError for a file that is missing, damaged or of another kind.
    """
    with reading(Path(path), "a checkpoint of Stable Diffusion"):
        file = open_checkpoint(path)
        check_architecture(file)
        prediction, why = guess_prediction(file, prediction)
        sd = build_empty(file, prediction)
        stored, extra = find_tensors(file, sd, use_ema)
        dtypes = read_weights(file, sd, stored, device, dtype)
        sd.zero_snr = zero_snr or "ztsnr" in file.shapes or file.metadata.get("zero_snr") == "true"
        if isinstance(file, CheckpointFile):
            sd.source = Source(path, file.text_prefix, dict(file.tensors(extra)), dtypes)
            sd.metadata = {name: value for name, value in file.metadata.items() if name != "format"}
        else:                                       # a folder is saved as a plain single file
            sd.source = Source(path, dtypes=dtypes)
            sd.metadata = {name: value for name, value in file.metadata.items() if name in MARIGOLD}
        if sd.is_depth_model and sd.metadata.get("image_input") != "first":     # an old file of ours: the noisy latents
            conv = sd.unet.input_blocks[0][0]
            conv.weight.data = conv.weight.data.roll(sd.config.latent_channels, 1)
    weights = ""
    if any(name.startswith("model_ema.diffusion_model") for name in file.shapes):
        weights = ", EMA weights" if use_ema else ", non-EMA weights (--use-ema loads the others)"
    print(f"{path}: Stable Diffusion {sd.config.version} layout, {len(file.shapes)} tensors, "
          f"{sum(p.numel() for p in sd.parameters()) / 1e6:.1f}M parameters as {str(dtype).removeprefix('torch.')}"
          f"{weights}; {prediction}-prediction ({why}){', zero terminal SNR' if sd.zero_snr else ''}")
    if DISTILLED.search(f"{Path(path).name} {sd.metadata.get('modelspec.title', '')}"):
        print(f"warning: {path}: its name says that it is distilled to few steps: such a network is no diffusion model "
              "of all timesteps any more, and the change of variables does not hold for it", file=sys.stderr)
    unusual = [name for name in extra if not USUAL_EXTRA.fullmatch(name)]
    if unusual:
        print(f"{path}: {len(unusual)} extra tensors are unused, and kept when the model is saved: "
              f"{', '.join(unusual[:3])}{' ...' if len(unusual) > 3 else ''}")
    return sd.requires_grad_(False).eval()
