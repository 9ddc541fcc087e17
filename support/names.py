"""What the layers are called: in single-file checkpoints, in diffusers folders, in Hugging Face's CLIP, in LoRA
files."""
import re

UNET, VAE = "model.diffusion_model.", "first_stage_model."
OPEN_CLIP, HF_CLIP = "cond_stage_model.model.", "cond_stage_model.transformer.text_model."   # SD 2.x, SD 1.x
XL_CLIP = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."   # SDXL's two

HF_NAMES = [  # (open_clip's name, the Hugging Face name as in SD 1.x); open_clip has q, k and v in one matrix
    (r"^token_embedding\.weight$", "embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^text_projection$", "text_projection.weight"),                               # which is its transpose
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.(\d+)\.ln_(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"encoder.layers.\1.self_attn.{}_proj."),
]
UNET_OUTER = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
              "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
              "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
UNET_INNER = {"in_layers.0": "resnets.{}.norm1", "in_layers.2": "resnets.{}.conv1",
              "emb_layers.1": "resnets.{}.time_emb_proj", "out_layers.0": "resnets.{}.norm2",
              "out_layers.3": "resnets.{}.conv2", "skip_connection": "resnets.{}.conv_shortcut",
              "op": "downsamplers.0.conv", "conv": "upsamplers.0.conv"}
VAE_NAMES = {  # substrings, replaced in this order
    "down.": "down_blocks.", "up.": "up_blocks.", ".block.": ".resnets.", ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.", "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0", "attentions.0.norm": "attentions.0.group_norm", ".q.": ".to_q.",
    ".k.": ".to_k.", ".v.": ".to_v.", "proj_out": "to_out.0", "nin_shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out"}


def hf_names(name):
    """A parameter of open_clip's text tower -> its Hugging Face names: one, or three to concatenate (q, k, v)."""
    for pattern, replacement in HF_NAMES:
        if re.match(pattern, name):
            name = re.sub(pattern, replacement, name)
            return [name.format(x) for x in "qkv"] if "{}" in name else [name]
    raise AssertionError(name)


def unet_path(path, config):
    """A layer's path in the UNet -> in diffusers' UNet: input_blocks.4.1.proj_in -> down_blocks.1.attentions.0.proj_in.

    The original layout numbers its blocks consecutively, with the same number of blocks at each resolution. Input block
    0 is the first conv, so input levels start at block 1; output levels start at block 0.
    """
    blocks_per_level = config.unet_res_blocks + 1
    if path in UNET_OUTER:
        return UNET_OUTER[path]
    stage, number, inner = re.fullmatch(r"(\w+)\.(\d+)\.(?:\d+\.)?(.+)", path).groups()
    number = int(number)
    if stage == "middle_block":                         # ResBlock 0, transformer 1, ResBlock 2
        level, position = "mid_block", number // 2
    elif stage == "input_blocks":
        level, position = f"down_blocks.{(number - 1) // blocks_per_level}", (number - 1) % blocks_per_level
    else:
        level, position = f"up_blocks.{number // blocks_per_level}", number % blocks_per_level
    return f"{level}.{UNET_INNER.get(inner, 'attentions.{}.' + inner).format(position)}"


def vae_name(name, levels):
    """A parameter of the autoencoder -> its name in diffusers, where the decoder's levels are counted from the other
    end."""
    name = re.sub(r"(?<=decoder\.up\.)\d+", lambda match: str(levels - 1 - int(match[0])), name)
    for ours, theirs in VAE_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def file_names(parameter, text_prefix):
    """A parameter of StableDiffusion -> the names of its tensors in a single file."""
    if parameter.startswith(OPEN_CLIP):
        return [text_prefix + parameter.removeprefix(OPEN_CLIP)]
    for prefix, in_file in (HF_CLIP, text_prefix), (XL_CLIP[0], XL_CLIP[0]):
        if parameter.startswith(prefix):
            return [in_file + name for name in hf_names(parameter.removeprefix(prefix))]
    return [parameter]


def folder_names(parameter, config):
    """A parameter of StableDiffusion -> the names of its tensors in a diffusers folder, such as unet/conv_in.weight."""
    if parameter.startswith(UNET):
        path, _, kind = parameter.removeprefix(UNET).rpartition(".")
        return [f"unet/{unet_path(path, config)}.{kind}"]
    if parameter.startswith(VAE):
        return ["vae/" + vae_name(parameter.removeprefix(VAE), len(config.vae_widths))]
    folders = {OPEN_CLIP: "text_encoder/", HF_CLIP: "text_encoder/", XL_CLIP[0]: "text_encoder/",
               XL_CLIP[1]: "text_encoder_2/"}
    prefix = next(prefix for prefix in folders if parameter.startswith(prefix))
    return [folders[prefix] + name for name in hf_names(parameter.removeprefix(prefix))]
