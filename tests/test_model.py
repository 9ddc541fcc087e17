"""model.py computes the same as diffusers, transformers and open_clip, and keeps its precision in training.

The checkpoints are random, without zeros, with the names of the real files, at a tenth of the width.
"""
import platform
import random
import time
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file

from model import SD15, SD21, Attention, DepthUNet, StableDiffusion, attend, text_tower, tokenize, tokenizer
from support import packed
from support.checkpoint import load_checkpoint, save_checkpoint
from support.load import picture_size
from tests.checkpoints import NARROW, PROMPTS, clip_ids, randn, references, relative

TOLERANCE = 1e-9  # in float64: summation order is 1e-15, a wrong GroupNorm eps in one layer 3e-9 or more


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def both(request, files):
    """Our model and the reference implementations in float64, from one file."""
    theirs = references(NARROW[request.param], load_file(files[request.param]))
    for module in vars(theirs).values():
        module.double()
    return load_checkpoint(files[request.param], dtype=torch.float64), theirs


def inputs(dtype=torch.float32):
    """x_dm (2, 4, 8, 16), t_dm (2,) and context (2, 77, 128) for a narrow UNet."""
    return randn(2, 4, 8, 16).to(dtype), torch.tensor([3.3, 999.0], dtype=dtype), randn(2, 77, 128, seed=2).to(dtype)


# ------------------------------------------------------------------ parity with independent implementations

def test_the_unet_equals_diffusers_at_integer_and_fractional_timesteps(both):
    ours, theirs = both
    assert relative(ours.unet(*inputs(torch.float64)), theirs.unet(*inputs(torch.float64)).sample) < TOLERANCE


def test_the_encoder_equals_diffusers(both):
    ours, theirs = both
    images = randn(2, 3, 48, 24)
    posterior = theirs.vae.encode(images).latent_dist
    mean, std = ours.first_stage_model.moments(images)
    assert relative(mean, posterior.mean) < TOLERANCE and relative(std, posterior.std) < TOLERANCE
    assert relative(ours.encode(images), 0.18215 * posterior.mean) < TOLERANCE


def test_the_decoder_equals_diffusers(both):
    ours, theirs = both
    latents = randn(2, 4, 4, 6)
    assert relative(ours.decode(latents), theirs.vae.decode(latents / 0.18215).sample) < TOLERANCE


def test_text_embeddings_equal_transformers(both):
    ours, theirs = both
    ids = clip_ids(PROMPTS, 0 if ours.config.open_clip else 49407)
    assert relative(ours.encode_text(PROMPTS), theirs.text(ids).last_hidden_state) < TOLERANCE


@pytest.mark.parametrize("config, name", [(SD15, "ViT-L-14-quickgelu"), (SD21, "ViT-H-14")])
def test_the_text_towers_have_the_sizes_of_open_clips_published_configurations(config, name):
    published = open_clip.get_model_config(name)
    with torch.device("meta"):
        tower = text_tower(config.text_width, config.text_layers, config.vocabulary, config.open_clip, False)
    blocks = tower.transformer.resblocks
    sizes = tuple(published["text_cfg"][key] for key in ("width", "heads", "layers"))
    assert (tower.width, blocks[0].attn.num_heads, len(blocks)) == sizes
    assert isinstance(blocks[0].mlp.gelu, QuickGELU) == published.get("quick_gelu", False)


def test_token_ids_equal_transformers_and_open_clip():
    for pad_token in (0, 49407):
        assert torch.equal(tokenize(PROMPTS, pad_token), clip_ids(PROMPTS, pad_token))
    assert torch.equal(tokenize(PROMPTS, 0), open_clip.get_tokenizer("ViT-H-14")(PROMPTS))


ODD_WORDS = ["&amp;amp;lt;", "\t", "\u00a0 ", "İ", "ß", "١", "1", "'ll", "ï¬‚", "😂", "<end_of_text>", "x" * 60,
             "\u200b", "\ud800", "thinkbigsundaywithmarsha", "!?", "é", "東京"]


def test_token_ids_equal_open_clip_for_odd_and_for_long_words():
    rng, clip = random.Random(0), tokenizer()
    spelled = [bytes(clip.byte_decoder[c] for c in token.removesuffix("</w>")).decode(errors="ignore")
               for token in clip.encoder if "_of_text" not in token]
    longest = sorted(spelled, key=len)[-300:]
    for i in range(20):
        words = [ODD_WORDS, longest, spelled, [rng.choice(spelled), rng.choice(longest)]][i % 4]
        text = "".join(rng.choices(words, k=rng.choice([20, 200, 1500])))[:6000]
        assert torch.equal(tokenize([text], 0), open_clip.get_tokenizer("ViT-H-14")([text])), text[:100]


def test_one_word_of_200_000_letters_is_tokenized_in_seconds():
    """open_clip's time for a word is quadratic in its length: minutes for this one."""
    word, start = "".join(random.Random(0).choices("abcdefghij", k=200_000)), time.time()
    ids = tokenize([word], 0)[0]
    assert time.time() - start < 5
    assert ids.tolist() == [49406, *tokenizer().encode(word[:8000])[:75], 49407]


def test_a_caption_of_200_000_letters_is_tokenized_in_seconds():
    rng, clip = random.Random(0), tokenizer()
    words = [token.removesuffix("</w>") for token in clip.encoder if token.endswith("</w>")]
    caption, start = " ".join(rng.choices(words, k=60_000))[:200_000], time.time()
    ids = tokenize([caption], 0)[0]
    assert time.time() - start < 5                                  # 0.6 s on one core
    assert len(caption) == 200_000 and ids.tolist() == [49406, *clip.encode(caption)[:75], 49407]


def test_typographic_characters_are_tokenized_like_plain_ones():
    """open_clip cleans text with ftfy, as CLIP's own code does; transformers 5 does not."""
    plain, fancy = ["it's a \"cat\" & a dog", "fine ABC"], ["it’s a “cat” &amp; a dog", "ﬁne ＡＢＣ"]
    assert torch.equal(tokenize(fancy, 0), tokenize(plain, 0))


# ------------------------------------------------------------------ inputs

@pytest.fixture
def sd():
    """SD 1.5 on the meta device, without weights."""
    with torch.device("meta"):
        return StableDiffusion(SD15, "eps")


def test_sizes_that_the_networks_cannot_halve_are_refused_with_a_one_line_error(sd):
    for size in ((7, 8), (8, 12)):
        with pytest.raises(ValueError, match=f"^latents of {size[0]}x{size[1]}: .* 8$"):
            sd.unet(torch.zeros(1, 4, *size), torch.zeros(1), torch.zeros(1, 77, 768))
    for size in ([64, 100], [0, 64]):
        with pytest.raises(ValueError, match=f"^size {size[0]}x{size[1]}: both sides must be multiples of 64"):
            picture_size(sd, size)


def test_a_pictures_size_is_the_given_one_else_the_metadatas_else_512(sd):
    assert picture_size(sd, [64, 128]) == (64, 128) and picture_size(sd, [128]) == (128, 128)
    assert picture_size(sd) == (512, 512)
    sd.metadata["resolution"] = "384 512"
    assert picture_size(sd) == (384, 512)


def test_a_new_depth_model_equals_the_plain_one_if_the_image_equals_the_noisy_latents_which_come_last(
        files, tmp_path):
    plain, depth = load_checkpoint(files["sd21"]), load_checkpoint(files["sd21"])
    for _ in range(2):                                              # the second call changes nothing
        depth.add_image_input()
    (x, t_dm, _), text = inputs(), plain.encode_text(["a cat"])
    expected, net = plain.unet(x, t_dm, text.expand(2, -1, -1)), DepthUNet(depth.unet, text)
    assert depth.is_depth_model and not plain.is_depth_model
    assert relative(net(x, t_dm, x), expected) < 1e-5 < 1e-2 < relative(net(x, t_dm, -x), expected)
    depth.unet.input_blocks[0][0].weight *= torch.tensor([0.0, 2.0]).repeat_interleave(4)[:, None, None]
    assert relative(net(x, t_dm, -x), expected) < 1e-5
    save_checkpoint(depth, tmp_path / "depth.safetensors")
    assert load_checkpoint(tmp_path / "depth.safetensors").is_depth_model


# ------------------------------------------------------------------ numerics in training

@pytest.mark.parametrize("tokens", [64, 300])                       # below and above 256: two code paths
def test_attention_in_bfloat16_on_a_cpu_is_attention(tokens):
    q, k, v = (randn(2, 8, n, 8, seed=n + i).bfloat16() for i, n in enumerate((tokens, 77, 77)))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative(attend(q, k, v), exact) < 8e-3                  # bfloat16 has 8 bits: 2^-8 = 4e-3


def test_under_bf16_autocast_the_time_embedding_is_float32_and_the_output_stays_close(files):
    sd = load_checkpoint(files["sd21"])
    exact, dtypes = sd.unet(*inputs()), set()
    sd.unet.time_embed.register_forward_hook(lambda module, args, output: dtypes.update({args[0].dtype, output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        rough = sd.unet(*inputs())
    assert dtypes == {torch.float32} and 1e-4 < relative(rough, exact) < 2.5e-2


def test_activation_checkpointing_recomputes_activations_and_changes_no_gradient(files):
    unet = load_checkpoint(files["sd21"]).unet.requires_grad_().train()
    calls, gradients = [], []
    unet.input_blocks[1][0].in_layers[1].register_forward_hook(lambda *args: calls.append(1))
    for unet.checkpointing in (False, True):
        unet.zero_grad()
        unet(*inputs()).square().sum().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# ------------------------------------------------------------------ packed convs, and precision while sampling

def outputs(sd):
    """-> the outputs of UNet, encoder and decoder for fixed inputs of several sizes."""
    return [sd.unet(*inputs()), sd.unet(randn(1, 4, 16, 8).float(), torch.tensor([5.0]), randn(1, 77, 128).float()),
            sd.encode(randn(1, 3, 16, 32).float()), sd.decode(randn(1, 4, 2, 4).float())]


def count(sd, kind):
    return sum(isinstance(layer, kind) for layer in sd.modules())


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_adds_no_error_to_the_outputs_at_any_size(files, name, dtype):
    """Sums are in another order: 1e-5 in float32. In bfloat16 the error is as large as that of the unpacked model."""
    exact, sd = outputs(load_checkpoint(files[name])), load_checkpoint(files[name], dtype=dtype)
    before, convs = outputs(sd), count(sd, torch.nn.Conv2d)
    packed.pack(sd)
    n = count(sd, packed.PackedConv2d)
    assert n in (0, convs) and (dtype == torch.bfloat16 or platform.machine() != "x86_64" or n)
    for after, plain, truth in zip(outputs(sd), before, exact):
        assert relative(after, truth) < 1.5 * relative(plain, truth) + 1e-5


def test_attention_with_joined_matrices_is_the_same(files):
    for name in "sd15", "sd21":
        sd = load_checkpoint(files[name], dtype=torch.float64)
        before, attentions = sd.unet(*inputs(torch.float64)), count(sd, Attention)
        packed.fuse(sd.unet)
        assert count(sd, packed.FusedAttention) == attentions > 0
        assert relative(sd.unet(*inputs(torch.float64)), before) < 1e-12


MISSING = {  # what packing needs: how to take it away
    "the private operation that reorders a weight": lambda patch: patch.delattr(
        torch._C._nn, "mkldnn_reorder_conv2d_weight", raising=False),
    "the private operation that convolves": lambda patch: patch.setattr(torch.ops, "mkldnn", SimpleNamespace()),
    "oneDNN": lambda patch: patch.setattr(torch.backends.mkldnn, "is_available", lambda: False),
    "an x86 CPU": lambda patch: patch.setattr(platform, "machine", lambda: "arm64"),
    "ENABLED": lambda patch: patch.setattr(packed, "ENABLED", False),
}


@pytest.mark.parametrize("what", MISSING)
def test_without_what_packing_needs_the_convs_stay_ordinary_ones(files, monkeypatch, what):
    sd = load_checkpoint(files["sd15"])
    before, convs = outputs(sd), count(sd, torch.nn.Conv2d)
    MISSING[what](monkeypatch)
    assert not packed.can_pack(torch.float32)
    packed.pack(sd)
    assert count(sd, packed.PackedConv2d) == 0 and count(sd, torch.nn.Conv2d) == convs
    assert all(torch.equal(after, plain) for after, plain in zip(outputs(sd), before))


def test_a_model_loaded_as_bf16_stays_close_to_float32(files):
    images, latents, rough, exact = randn(1, 3, 16, 16).float(), randn(1, 4, 2, 2).float(), [], []
    for results, dtype in (rough, torch.bfloat16), (exact, torch.float32):
        sd = load_checkpoint(files["sd21"], dtype=dtype)
        results += [sd.unet(*inputs()), sd.encode(images), sd.decode(latents), sd.encode_text(PROMPTS[:3])]
    assert all(a.dtype == torch.bfloat16 and relative(a, b) < 3e-2 for a, b in zip(rough, exact))


def test_timesteps_are_not_rounded_in_a_bf16_network(files):
    sd, received = load_checkpoint(files["sd15"], dtype=torch.bfloat16), []
    sd.unet.time_embed.register_forward_hook(lambda module, args, output: received.append(args[0]))
    sd.unet(torch.zeros(2, 4, 8, 8), torch.tensor([998.0, 999.5]), torch.zeros(2, 77, 128))  # in bfloat16 both are 1000
    assert received[0].dtype == torch.float32 and relative(*received[0]) > 0.1
