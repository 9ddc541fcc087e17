"""Are the tests strong enough? Break the code in one place at a time, and see whether a test fails.

    python -m tests.mutations                       every mutation: "killed" if a test fails, "survived" if none does
    python -m tests.mutations "guidance" --jobs 2   only the mutations whose names contain "guidance", two at a time

A mutation replaces one text of one file. It is made in a copy of the tree, where the tests are run that should fail.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOMS = {  # file: (the tests that should fail, [(name of the mutation, old text, new text), ...])
    "schedule.py": ("test_diff2flow.py", [
        ("schedule: beta ends swapped", "linspace(beta_start**0.5, beta_end**", "linspace(beta_end**0.5, beta_start**"),
        ("schedule: beta linear", "torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2",
         "torch.linspace(beta_start, beta_end, T, dtype=torch.float64)"),
        ("schedule: beta_end", "beta_end=0.012", "beta_end=0.02"),
        ("schedule: one level late", "(1 - beta).cumprod(0)", "(1 - beta).roll(1).cumprod(0)"),
        ("schedule: zero_snr does not scale", "[0] * (alpha - alpha[-1]) / (alpha[0] - alpha[-1])", " - alpha[-1]"),
        ("schedule: alpha and sigma swapped", "return alpha.to(device), (1 - alpha**2).sqrt().to(device)",
         "return (1 - alpha**2).sqrt().to(device), alpha.to(device)"),
        ("schedule: sigma without the square", "(1 - alpha**2).sqrt()", "(1 - alpha).sqrt()"),
    ]),
    "diff2flow.py": ("test_diff2flow.py", [
        ("interpolate: data and noise swapped", "t_fm * x1 + (1 - t_fm) * x0", "t_fm * x0 + (1 - t_fm) * x1"),
        ("interpolate: sign", "t_fm * x1 + (1 - t_fm) * x0", "t_fm * x1 - (1 - t_fm) * x0"),
        ("alpha_sigma: swapped", "return r * t_fm, r * (1 - t_fm)", "return r * (1 - t_fm), r * t_fm"),
        ("alpha_sigma: r is 1", "(t_fm**2 + (1 - t_fm) ** 2).rsqrt()", "torch.ones_like(t_fm)"),
        ("masked_mean: mask ignored", "x.mean() if mask is None else (x * mask)", "x.mean() if mask is None else x"),
        ("masked_mean: channels not counted", "mask.expand_as(x).sum()", "mask.sum()"),
        ("masked_mean: clamp removed", ".sum().clamp(min=1)", ".sum()"),
        ("Diff2Flow: eps with zero_snr accepted", "and alpha[-1] == 0", "and alpha[0] == 0"),
        ("f_table: sigma for alpha", "(alpha / (alpha + sigma)).double()", "(sigma / (alpha + sigma)).double()"),
        ("f_t: first interval", "clamp(0, self.T - 2)", "clamp(1, self.T - 2)"),
        ("f_t: low + 1 is low", "(self.f_table[low], self.f_table[low + 1", "(self.f_table[low], self.f_table[low"),
        ("f_t: sign", "t_dm.double() - low", "low - t_dm.double()"),
        ("f_t_inv: clamp removed", "t_fm.double().clamp(self.f_table[-1], self.f_table[0])", "t_fm.double()"),
        ("f_t_inv: first interval", ".clamp(min=1) - 1", ".clamp(min=2) - 1"),
        ("f_t_inv: interval off by one", ".clamp(min=1) - 1", ".clamp(max=self.T - 2)"),
        ("f_t_inv: sign", "(low + (t_fm - f_low)", "(low - (t_fm - f_low)"),
        ("f_t_inv: integer timesteps", "(low + (t_fm - f_low) / (f_high - f_low)).float()", "low.float()"),
        ("flow: r at the clamped time", "alpha_sigma(t_fm.view(-1, 1, 1", "alpha_sigma(self.f_t(t_dm).view(-1, 1, 1"),
        ("flow: x_dm sign", "x_dm = (alpha + sigma) * x_fm", "x_dm = (alpha - sigma) * x_fm"),
        ("flow: timestep one late", "self.net(x_dm, t_dm, context)", "self.net(x_dm, t_dm + 1, context)"),
        ("flow: eps read as v", 'if self.prediction == "eps":  #', 'if self.prediction == "v":  #'),
        ("flow: eps converted at t_fm", "= alpha_sigma(self.f_t(t_dm).view(-1, 1, 1, 1))\n            v",
         "= (alpha, sigma)\n            v"),
        ("flow: eps sign", "(v - sigma_dm * x_dm) / alpha_dm", "(v + sigma_dm * x_dm) / alpha_dm"),
        ("flow: sign of v", "return (alpha - sigma) * x_dm - (alpha + ", "return (alpha - sigma) * x_dm + (alpha + "),
        ("flow: sign of x_dm", "return (alpha - sigma) * x_dm", "return (sigma - alpha) * x_dm"),
        ("flow: as printed in Eq. 16", "(alpha + sigma) * v ", "(alpha - sigma) * v "),
        ("loss: noise uniform", "x0 = torch.randn_like(x1) if x0 is None else x0\n        t_fm",
         "x0 = torch.rand_like(x1) if x0 is None else x0\n        t_fm"),
        ("loss: one time a batch", ".rand(len(x1), device=x1.device", ".rand(1, device=x1.device).expand(len(x1)"),
        ("loss: given noise ignored", "(x1) if x0 is None else x0\n        t_fm", "(x1)\n        t_fm"),
        ("velocity_error: sign of the target", "(u - (x1 - x0))", "(u - (x0 - x1))"),
        ("velocity_error: mask ignored", "(u - (x1 - x0)).square(), mask)", "(u - (x1 - x0)).square())"),
        ("grid: backwards", "torch.linspace(0, 1, steps + 1", "torch.linspace(1, 0, steps + 1"),
        ("grid: from the noisiest trained level", "torch.linspace(0, 1,", "torch.linspace(self.f_table[-1].item(), 1,"),
        ("sample: time of the next step", "t_fm = grid[i].expand", "t_fm = grid[i + 1].expand"),
        ("sample: sign of the step", "x_fm = x_fm + (grid", "x_fm = x_fm - (grid"),
        ("sample: previous step's size", "(grid[i + 1] - grid[i]) * u", "(grid[i] - grid[i - 1]) * u"),
        ("sample: guidance sign", "u_uncond + cfg * (u - u_uncond)", "u_uncond - cfg * (u - u_uncond)"),
        ("sample: guidance halves swapped", "u, u_uncond = self(", "u_uncond, u = self("),
        ("sample: guidance images interleaved", "x_fm.repeat(2, 1, 1, 1)", "x_fm.repeat_interleave(2, 0)"),
        ("sample: cfg 0 without guidance", "if cfg == 1:", "if cfg in (0, 1):"),
        ("sample: callback sees the noise", "            callback(x_fm)\n", "            callback(x0)\n"),
        ("dm: noise not scaled to the first level", "x0.float() / (alpha + sigma)", "x0.float()"),
        ("dm: last timestep never drawn", "torch.randint(self.T,", "torch.randint(self.T - 1,"),
        ("dm: timestep not rounded", "self.f_t_inv(t_fm).round()", "self.f_t_inv(t_fm)"),
        ("dm: sign of the target", "alpha * x0 - sigma * x1", "alpha * x0 + sigma * x1"),
        ("dm: alpha and sigma swapped in x_dm", "self.net(alpha * x1 + sigma * x0", "self.net(sigma * x1 + alpha * x0"),
        ("dm: mask ignored", "(output - target).square(), mask)", "(output - target).square())"),
        ("dm: leading grid", "(self.T - self.T / steps * torch.arange(steps, device=self.f_table.device)).round() - 1",
         "(self.T - self.T / steps * torch.arange(1, steps + 1, device=self.f_table.device)).round()"),
        ("dm: grid off by one", ".round() - 1\n", ".round().clamp(max=self.T - 1)\n"),
        ("fm: sign", "return self.net(x_fm.float()", "return -self.net(x_fm.float()"),
        ("fm-flip: sign", "return -super()", "return super()"),
        ("fm: time runs backwards", "self.net(x_fm.float(), t_fm.float()", "self.net(x_fm.float(), 1 - t_fm.float()"),
        ("sample: guidance without uncond", "if cfg != 1 and uncond is None:", "if False:"),
        ("f_t: the table stays on its device", "self.f_table = self.f_table.to(t_dm.device)\n", "pass\n"),
        ("f_t_inv: the table stays on its device", "self.f_table = self.f_table.to(t_fm.device)\n", "pass\n"),
        ("sample: the grid stays on its device", "self.grid(steps).to(x0.device)", "self.grid(steps)"),
    ]),
    "model.py": ("tests/test_model.py tests/test_checkpoint.py tests/test_tools.py", [
        ("model: GroupNorm eps", "nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels",
         "nn.GroupNorm(32, channels, eps=1e-3), nn.SiLU(), nn.Conv2d(channels, out_channels"),
        ("model: GroupNorm eps of the transformers", ", eps=1e-6)\n        self.proj_in", ")\n        self.proj_in"),
        ("model: tanh gelu", "F.gelu(gate)", 'F.gelu(gate, approximate="tanh")'),
        ("model: VAE padding", "(0, 1, 0, 1)", "(1, 0, 1, 0)"),
        ("model: log variance not halved", "(0.5 * log_variance", "(log_variance"),
        ("model: last text layer of SD 2", "ids, self.config.text_layers_used", "ids, self.config.text_layers"),
        ("model: last of 23 text layers left out", "self.open_clip and self.text_layers != 23", "self.open_clip"),
        ("model: 77 tokens of content", "encode(prompt[:5000])[:75]", "encode(prompt[:5000])[:77]"),
        ("model: text padding", "pad_token=0 if", "pad_token=49407 if"),
        ("model: LATENT_SCALE", "else 0.18215", "else 0.13025"),
        ("model: picture input not halved", ".weight, conv.weight], dim=1) / 2", ".weight, conv.weight], dim=1)"),
        ("model: noise before the picture", "torch.cat([picture, x_dm]", "torch.cat([x_dm, picture]"),
    ]),
    "lora.py": ("tests/test_lora.py tests/test_other_loras.py", [
        ("lora: ratio of the smaller side", "max(layer.weight.shape[:2])", "min(layer.weight.shape[:2])"),
        ("lora: smaller side not fixed", "smaller.requires_grad_(False).flatten(1)", "smaller.data.flatten(1)"),
        ("lora: last conv not in full", 'if path in ("input_blocks.0.0", "out.2"):', 'if path == "input_blocks.0.0":'),
        ("lora: first conv not in full", 'if path in ("input_blocks.0.0", "out.2"):', 'if path == "out.2":'),
        ("lora: merge sign", "weight += strength", "weight -= strength"),
        ("lora: merge without strength", "weight += strength * (up", "weight += (up"),
    ]),
    "data.py": ("tests/test_data.py tests/test_train.py tests/test_files.py", [
        ("data: metadata before the text file", "(text and read_caption(text)) or caption or",
         "caption or (text and read_caption(text)) or"),
        ("data: never flipped", "ImageOps.mirror(crop) if is_mirrored else crop", "crop"),
        ("data: crop always in the centre", "right * (image.width - width), down", "0.5 * (image.width - width), 0.5"),
        ("data: the same crop every epoch", "((self.seed, key", "((self.seed, key % len(self.items)"),
        ("data: cached pictures of a corner", "crop_box(image, height, width, 0.5, 0.5)",
         "crop_box(image, height, width, 0, 0)"),
        ("data: keys not shuffled", "epoch * self.n + order[i]", "epoch * self.n + i"),
        ("data: the same order every epoch", "(self.seed, epoch)).perm", "(self.seed, 0)).perm"),
        ("data: keys without the epoch", "epoch * self.n + order[i]", "order[i]"),
        ("data: kept latents of another key", "i = key % len(self.dataset)", "i = key % (len(self.dataset) - 1)"),
        ("data: every process takes all keys", "range(start + rank * batch, stop, ranks * batch)",
         "range(start, stop, batch)"),
        ("data: noise depends on the seed alone", "default_rng((seed, i)).standard_normal",
         "default_rng((seed, 0)).standard_normal"),
        ("data: held-out pictures trained on", "for i, item in enumerate(self.items) if i not in chosen]",
         "for i, item in enumerate(self.items)]"),
        ("data: the first pictures held out", "sorted(range(len(self)), key=", "range(len(self)) or sorted((), key="),
        ("data: batches of buckets in the order of their shapes", "[batches[i] for i in rng.permutation(len(batches))]",
         "batches"),
        ("data: buckets filled up with the same crops", "(epoch + (turn << 32)) * self.n", "epoch * self.n"),
    ]),
    "train.py": ("tests/test_train.py tests/test_init_lora.py tests/test_cache.py tests/test_pairs.py", [
        ("depth: mask inverted", '"mask": 1 - has_hole', '"mask": has_hole'),
        ("train.py: warm-up from 0", "args.lr * (step + 1) / args.warmup", "args.lr * step / args.warmup"),
        ("train.py: cosine to 0", "0.01 + 0.99 * 0.5", "0.5"),
        ("train.py: EMA the other way round", "weight = 1 - min(decay,", "weight = min(decay,"),
        ("train.py: gradients summed, not averaged", "mask=mask) / run.grad_accum", "mask=mask)"),
        ("train.py: gradients never reset", "optimizer.zero_grad()", "pass"),
        ("train.py: gradients not clipped", "(trained.values(), args.clip", "(trained.values(), math.inf"),
        ("train.py: captions kept, not dropped", "< share, captions", ">= share, captions"),
        ("train.py: data start again on resume", "run.start * images_per_step,", "0,"),
        ("train.py: mask of the latents ignored", 'batch["image_latents"], batch["mask"]',
         'batch["image_latents"], None'),
        ("train.py: noise of the pairs ignored", 'return batch["x1"], batch["x0"],', 'return batch["x1"], None,'),
        ("train.py: dropped captions keep their cached state",
         'torch.where(is_empty, batch["empty"], batch["context"])',
         'batch["context"]'),
        ("train.py: --init-lora ignored with all weights", "BUNDLED_PRIOR, args.init_lora, device",
         'BUNDLED_PRIOR, args.init_lora if args.lora == "init" else None, device'),
        ("train.py: --init-lora merged, not continued", ', trainable=args.lora == "init")', ")"),
    ]),
    "sample.py": ("tests/test_sample.py tests/test_written.py", [
        ("sample.py: --first with the noise of picture 0", "noises([args.first + i for i in batch]", "noises(batch"),
        ("sample.py: --first with the prompt of picture 0", "for i in numbers]", "for i in range(n)]"),
        ("sample.py: sigma grid start", "flow.f_table[-1].item()", "flow.f_table[-2].item()"),
        ("sample.py: sigmas printed too short", "{sigma:.4f}", "{sigma:.3f}"),
        ("sample.py: sigmas of naive models printed", 'if objective_of(flow) in NAIVE:', "if False:"),
        ("sample.py: captions of the run ignored", "    if captions:\n", "    if False:\n"),
    ]),
    "depth.py": ("tests/test_depth.py tests/test_written.py", [
        ("depth: the truth is replaced", "if array.exists() and not picture.exists():", "if False:"),
        ("depth: quantiles", "[0.01, 0.99]", "[0.0, 1.0]"),
        ("depth: near is 1", "(2 * (log_depth - low) /", "(2 * (high - log_depth) /"),
        ("depth: flipped without its picture", "depth.flip(-1), valid.flip(-1)", "depth, valid.flip(-1)"),
        ("depth: ensemble is its first sample", "torch.stack(samples).mean(0)", "samples[0]"),
        ("depth: pictures without depth trained on", "            if not valid.any():\n", "            if False:\n"),
        ("depth: held-out pictures trained on", "self.folders[i] = sorted(by_hash[count:])", "pass"),
    ]),
    "support/cache.py": ("tests/test_cache.py", [
        ("cache: a cache for any network", "{self.network}\\n{source}", "{source}"),
        ("cache: checksums not checked", "or checksum(tensor) != expected:", ":"),
    ]),
    "support/checkpoint.py": ("tests/test_model.py tests/test_checkpoint.py tests/test_tools.py tests/test_sample.py", [
        ("checkpoint: infinity accepted", "math.isfinite(low) and math.isfinite(high)", "low == low"),
        ("checkpoint: NaN accepted", "or not is_finite(tensor):", "or False:"),
        ("checkpoint: times rounded in bf16", "torch.promote_types(dtype, torch.float32)", "dtype"),
        ("checkpoint: missing tensors accepted", "missing, extra = sorted(wanted - file.shapes.keys()),",
         "missing, extra = [],"),
        ("checkpoint: wrong shapes accepted", "if file.shapes[name] != expected and", "if False and"),
        ("checkpoint: unknown tensors of the networks accepted", "if NETWORK.match(name) and not", "if False and not"),
        ("checkpoint: extra tensors not kept", "dict(file.tensors(extra))", "{}"),
        ("checkpoint: saved in one precision", "dtype or source.dtypes.get(parameter, value.dtype)",
         "dtype or value.dtype"),
        ("checkpoint: saved with the usual prefix", "prefix = source.text_prefix or (", "prefix = ("),
        ("checkpoint: any UNet of 8 channels is a depth model", "and not is_depth:", "and False:"),
        ("checkpoint: an old depth model's inputs in the wrong order", ".roll(sd.config.latent_channels, 1)", ""),
        ("checkpoint: v_pred ignored", ' and "v_pred" in file.shapes:', ' and False:'),
        ("checkpoint: ztsnr ignored", '"ztsnr" in file.shapes or', ""),
        ("checkpoint: a folder's schedule not checked", "if betas != (", "if False and betas != ("),
        ("checkpoint: a folder's heads not checked", "if heads != [", "if False and heads != ["),
        ("checkpoint: any variant of a folder", "variants[min(variants)]", "variants[max(variants)]"),
        ("checkpoint: q, k, v as they come", "[read.pop(name) for name in stored[parameter]]",
         "[read.pop(name) for name in sorted(stored[parameter])]"),
        ("checkpoint: hash in the file's precision", "tensor.flatten()[:1024].half()",
         "tensor.flatten()[:1024].float()"),
        ("checkpoint: height by width", '"modelspec.resolution": f"{size[1]}x{size[0]}"',
         '"modelspec.resolution": f"{size[0]}x{size[1]}"'),
    ]),
    "support/decode.py": ("tests/test_folders.py tests/test_data.py", [
        ("decode: any format is opened", "io.BytesIO(content), formats=formats())", "io.BytesIO(content))"),
        ("decode: pictures that we wrote", "maker_of(path) == SOFTWARE:", "False:"),
    ]),
    "support/depth_files.py": ("tests/test_depth.py", [
        ("depth: distance taken for depth", "planar_depth(read_hdf5(path))", "read_hdf5(path)"),
    ]),
    "support/files.py": ("tests/test_files.py tests/test_data.py tests/test_run.py tests/test_written.py", [
        ("files: every file is ours", "if os.path.lexists(path) and maker_of(path) != SOFTWARE:", "if False:"),
        ("files: no file is ours", "and maker_of(path) != SOFTWARE:", ":"),
        ("atomic write of tensors",
         'yield temporary\n        with where_supported(path, "fsync"), open(temporary, "rb+") as file:\n     '
         "       os.fsync(file.fileno())\n        replace(temporary, path)",
         "yield path"),
        ("cli: exit code of an error", "sys.exit(2)", "sys.exit(1)"),
        ("files: not forced to the disk", "os.fsync(file.fileno())", "pass"),
        ("files: any error of torch is the user's", "elif isinstance(error, RuntimeError):", "elif False:"),
        ("files: out of memory is a fault of ours", "isinstance(error, MemoryError) or NO_M", "False and NO_M"),
        ("files: temporary left behind", "        temporary.unlink(missing_ok=True)", "        pass"),
        ("files: a closed terminal ends the run",
         "(Stream(stream or open(os.devnull, \"w\")) for stream", "((stream or open(os.devnull, \"w\")) for stream"),
        ("files: an empty value is no value", 'if text == "" and name not in MAY_BE_EMPTY:', "if False:"),
        ("files: half-written files of anybody", "whole != path.name and any(", "any("),
        ("files: a full disk is found late", "file.write(bytes(min(2**24, size - start)))", "pass"),
        ("files: no chmod is an error", "if error.errno not in UNSUPPORTED:\n", "if True:\n"),
    ]),
    "support/folders.py": ("tests/test_folders.py tests/test_data.py", [
        ("folders: files in the order of their strings", 'key=lambda path: path.replace(os.sep, "\\0")', "key=str"),
        ("folders: links to folders are not followed", "heapq.heappush(links, entry.path)", "pass"),
        ("folders: accents as they are", 'unicodedata.normalize("NFC", path', 'str.strip(path'),
        ("folders: hidden pictures are read", 'name.startswith(".") or name in HIDDEN', "False"),
    ]),
    "support/load.py": ("tests/test_sample.py tests/test_written.py tests/test_pairs.py tests/test_train.py", [
        ("load: bf16 on AMX not seen", 'capabilities.get("amx_bf16", False) or ', ""),
        ("load: guidance after Reflow", 'sd.metadata.get("cfg", 4.0)', "4.0"),
        ("load: guidance of pairs after Reflow", "and float(value) != 1 else", "else"),
        ("load: objective of the file ignored", 'trained_by if trained_by in NAIVE else "', '"'),
        ("load: prediction of the LoRA ignored", "prediction_of(metadata)[0] or sd.prediction", "sd.prediction"),
        ("load: numbers that are too large are written", "if not all(tensor.abs().max() < 65504", "if not all(True"),
        ("load: another base not noticed", "if theirs == sd.unet_hash:", "if True:"),
        ("load: eps-LoRA on a v-network", "kind not in (None, sd.prediction)", "False"),
        ("load: an unknown base is the bundled prior", "if not bundled.is_file():", "if False:"),
        ("load: zero SNR of the LoRA ignored", 'sd.zero_snr or taken.get("zero_snr") == "true"', "sd.zero_snr"),
        ("load: the schedule ignores zero SNR", "sd_schedule(zero_snr=sd.zero_snr,", "sd_schedule("),
        ("load: the oldest run", "max(wanted, key=", "min(wanted, key="),
        ("load: depth models sampled as pictures", "if task is not None and sd.", "if False and sd."),
        ("load: a broken result stops sampling", "except (ValueError, TypeError, KeyError, OSError) as error:",
         "except TypeError as error:"),
        ("load: dm models sampled by DDIM", 'in NAIVE else', 'in (*NAIVE, "dm") else'),
        ("load: all weights compute in float32", '(sd.unet, "forward"), (sd, "encode")', '(sd, "encode")'),
        ("load: pictures are encoded in float32", '(sd, "encode"), (sd, "decode")', '(sd, "decode")'),
        ("load: bf16 on every CUDA device", ">= (8, 0)", ">= (0, 0)"),
        ("load: negative prompt ignored", "sd.encode_text([negative])", 'sd.encode_text([""])'),
    ]),
    "support/lora_file.py": ("tests/test_lora.py tests/test_other_loras.py tests/test_sample.py", [
        ("lora: alpha over rank upside down", "factor = float(alpha) / (", "factor = 1 / float(alpha) * ("),
        ("lora: alpha of PEFT ignored", 'alpha = setting("lora_alpha", rank)', "alpha = rank"),
        ("lora: the text encoder is left out", " | text_weights(sd)", ""),
        ("lora: an old depth LoRA's inputs in the wrong order", 'if is_old and layer == "conv_in":', "if False:"),
        ("lora: NaN accepted", "and not tensor.float().isfinite().all():", "and False:"),
        ("lora: rank 0 accepted", "tensor.ndim >= 2 and tensor.numel() and", "tensor.ndim >= 2 and"),
        ("lora: other kinds not named", "if any(re.search(pattern, key) for key in tensors):", "if False:"),
    ]),
    "support/names.py": ("tests/test_checkpoint.py tests/test_tools.py", [
        ("names: q, k, v of SD 1's text", 'for x in "qkv"', 'for x in "kqv"'),
        ("names: decoder levels not turned round", "str(levels - 1 - int(match[0]))", "match[0]"),
        ("names: diffusers' index of the input blocks", "{(number - 1) // blocks_per_level}",
         "{number // blocks_per_level}"),
    ]),
    "support/packed.py": ("tests/test_model.py tests/test_sample.py tests/test_compile.py", [
        ("packed: packed convs without their stride", "(conv.padding, conv.stride,", "(conv.padding, (1, 1),"),
        ("packed: used where the operation is missing", "    except AttributeError:\n        return False\n",
         "    except AttributeError:\n        has_operations = has_dtype = True\n"),
        ("packed: switch ignored", "return ENABLED and is_x86", "return is_x86"),
        ("packed: q, k, v joined in another order", "is_self + [attention.to_k, attention.to_v]",
         "is_self + [attention.to_v, attention.to_k]"),
        ("packed: q of self-attention computed twice", "None if is_self else attention.to_q", "attention.to_q"),
        ("packed: cross-attention not joined", "FusedAttention(block.attn2, False)", "block.attn2"),
        ("packed: --compile ignored", "    if compiled:\n", "    if False:\n"),
    ]),
    "support/pairs.py": ("tests/test_pairs.py tests/test_data.py", [
        ("pairs: of another prediction", "check_base(self.folder, self.made_with, sd, prediction)", "pass"),
        ("pairs: of a forgotten --ckpt", "if ckpt is None and not is_same:", "if False:"),
        ("data: held-out pairs are trained on", "self.n = n - validation", "self.n = n"),
        ("pairs: made again from the first", "range(made, len(wanted), args.", "range(0, len(wanted), args."),
        ("pairs: batches of pairs never joined", "            join_batches(shard, settings)", "            pass"),
        ("pairs: pairs of other settings mixed", 'if made["settings"] != settings:', "if False:"),
        ("pairs: pairs of any shape", 'if about["shape"] != shape:', "if False:"),
        ("pairs: pairs of other prompts mixed", "sha256(json.dumps(prompts).encode())", "sha256(b'')"),
        ("pairs: the command without the LoRA", 'words += ["--init-lora", *args.lora]', "pass"),
        ("pairs: several LoRAs are not merged", "if len(loras) > 1 or any(", "if False and any("),
        ("pairs: the command without the prediction", 'options = ["--prediction", args.prediction, *options]', "pass"),
    ]),
    "support/pictures.py": ("tests/test_data.py tests/test_files.py tests/test_written.py", [
        ("data: grid by columns", "i % self.columns * (self.column + self.gap), self.gap + i //",
         "i // self.columns * (self.column + self.gap), self.gap + i %"),
        ("pictures: other pictures beside single ones", "set(pictures_in(folder)) - set(files)", "set()"),
        ("pictures: single pictures replace others", "        check_replaceable(path)\n    return files",
         "        pass\n    return files"),
        ("pictures: Exif comment of the wrong type", "TiffTags.UNDEFINED, 1)", "TiffTags.BYTE, 1)"),
        ("pictures: names with commas not quoted", "if set(',:\"\\n') & set(value) else", "if False else"),
        ("pictures: columns too narrow for a caption", "max(self.width, NARROWEST) if", "self.width if"),
        ("atomic write of pictures", "    with replacing(path) as temporary:\n        picture.save(temporary, ",
         "    if True:\n        picture.save(path, "),
    ]),
    "support/processes.py": ("tests/test_train.py tests/test_run.py", [
        ("processes: pictures of one process", "for part in parts or [] for", "for part in (parts or [])[:1] for"),
        ("processes: a second Ctrl-C waits too", "(again and number == signal.SIGINT)", "False"),
        ("processes: loss of one process", "x /= self.count", "pass"),
        ("processes: gradients of one process", "DistributedDataParallel(net, broadcast_buffers=False)", "net"),
        ("processes: signals that Windows lacks", "if hasattr(signal, name))", ")"),
        ("processes: workers die of signals to the group", "for number in StopSignal.SIGNALS:\n",
         "for number in ():\n"),
        ("processes: a signal that Python drops", "again, self.received = self.received, True",
         "again = self.received\n        self.received = self.deferred"),
        ("processes: orphans of torchrun train on", "return self.torchrun not in (None, os.getppid())", "return False"),
        ("processes: workers are waited for for ever", "            process.kill()", "            pass"),
        ("processes: a killed worker is a bug",
         "if of_an_item or (isinstance(error, RuntimeError) and not WORKER_LOST.search(str(error))):", "if True:"),
        ("processes: nohup overruled", "if signal.getsignal(number) != signal.SIG_IGN]", "]"),
    ]),
    "support/prompts.py": ("tests/test_sample.py tests/test_train.py", [
        ("prompts: cut a token late", "decode(tokens[:TOKENS])", "decode(tokens[:TOKENS + 1])"),
        ("prompts: short means few characters", "<= TOKENS and text.isascii()", "<= TOKENS"),
        ("prompts: captions warned of in every step", "            self.warned = True\n", "            pass\n"),
    ]),
    "support/run.py": ("tests/test_train.py tests/test_run.py tests/test_written.py", [
        ("run: the same noise every step", "seed_of(self.args.seed, step * self.args.grad_accum + i)",
         "seed_of(self.args.seed, 0)"),
        ("run: the same noise in all batches of a step", "step * self.args.grad_accum + i)",
         "step * self.args.grad_accum)"),
        ("run: a run in a folder of data", "not any(map(Path(name).match, FILES)):", "False:"),
        ("run: a torn line kept", 'row.endswith(b"\\n") and', ""),
        ("run: an error loses the steps since the last save", "                run.save_after_error()",
         "                pass"),
        ("run: half a step is saved", "if changed == self.done and", "if"),
        ("run: logs of others replaced", "            check_replaceable(path)", "            pass"),
        ("run: streams of seeds overlap", "(seed * 2654435769 + i) % 2**32", "seed * 1_000_003 + i"),
        ("run: every seed the same on a CPU", "(seed * 2654435769 + i) % 2**32", "seed * 2**32 + i"),
    ]),
    "support/lock.py": ("tests/test_run.py tests/test_cache.py", [
        ("lock: two processes in a folder", "if not take(lock, folder, fcntl.LOCK_EX",
         "if not take(lock, folder, fcntl.LOCK_SH"),
        ("lock: no fcntl is an error", "except ImportError:", "except KeyError:"),
        ("lock: workers hold it", "os.register_at_fork(after_in_child=file.close)", "pass"),
        ("lock: links followed", "if path.is_symlink() or (", "if False and ("),
    ]),
    "support/state.py": ("tests/test_train.py tests/test_run.py", [
        ("state: Adam starts again on resume", 'if f"adam/step/{name}" in stored:', "if False:"),
        ("state: average starts again on resume", 'file, f"average/', 'file, f"parameter/'),
        ("state: states that do not fit", "(tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype)",
         "False"),
        ("state: any flag beside --resume", "if name not in may_change:", "if False:"),
        ("state: any base", 'metadata.get("base_hash", about.get("base_hash")) !=', 'about.get("base_hash") !='),
    ]),
    "support/tars.py": ("tests/test_tars.py", [
        ("tars: every worker reads all tars", "sys.maxsize, 1, reader, readers)", "sys.maxsize, 1, 0, 1)"),
        ("tars: truncated tars accepted", "if not has_content or any(file.read()):", "if not has_content:"),
        ("tars: held-out pictures trained on", "if (sample.tar, sample.key) not in self.held_out)", ")"),
        ("tars: no picture at all is waited for", "if without == set(self.tars):", "if False:"),
    ]),
    "support/validation.py": ("tests/test_train.py", [
        ("validation: velocity error not a mean", "mask).item() * len(x1)", "mask).item()"),
        ("validation: --prompt with other noise than sample.py", "self.noise.shape[1:], seed=0)",
         "self.noise.shape[1:], seed=1)"),
    ]),
    "tools/kernels.py": ("tests/test_kernels.py", [
        ("kernels: views count", "if not operation.is_view and not", "if not"),
        ("kernels: allocations count", "and name not in NO_KERNEL:", ":"),
        ("kernels: results are not bytes", "tree_leaves((args, kwargs, result))", "tree_leaves((args, kwargs))"),
        ("kernels: our matrices are not joined", "            fuse(net)\n", "            pass\n"),
    ]),
    "tools/bench.py": ("tests/test_bench.py", [
        ("bench: the peer's bf16 network gets float32", "x, condition = x.to(dtype), diffusers_condition(",
         "x, condition = x, diffusers_condition("),
    ]),
    "tools/evaluate.py": ("tests/test_evaluate.py", [
        ("evaluate: FID at the real size", "CroppedPictures(args.real, samples.size)", "CroppedPictures(args.real)"),
        ("evaluate: 10 before 2", "sorted(pictures_in(folder), key=natural_order)", "sorted(pictures_in(folder))"),
        ("evaluate: tokenizers of a hub", '["hf_tokenizer_name"] if for_prompts else []', "[]"),
        ("evaluate: CLIP mean over batches", "(pictures * texts).sum(1).mean().", "(pictures * texts).mean()."),
    ]),
    "tools/measure_depth.py": ("tests/test_measure_depth.py", [
        ("measure_depth: KITTI's crop from the top", "left = depth.shape[0] - height",
         "left = (depth.shape[0] - height) // 2"),
        ("measure_depth: NYU's crop one row late", "slice(45, 471)", "slice(46, 471)"),
        ("measure_depth: aligned in another space", '"log": (np.log, np.exp)', '"log": (np.asarray, np.asarray)'),
        ("measure_depth: a truth of any size", "if protocol.shape and depth.shape != protocol.shape:", "if False:"),
        ("measure_depth: delta1 threshold", "< 1.25)", "< 1.25**2)"),
        ("measure_depth: fitted in log space always", "align(prediction, truth, valid, args.align)",
         'align(prediction, truth, valid, "log")'),
    ]),
    "tools/merge.py": ("tests/test_tools.py tests/test_lora.py", [
        ("merge: merged file keeps the LoRA's title", "**modelspec(sd, Path(args.out).stem, picture_size(sd))", "**{}"),
    ]),
    "toy/scenes.py": ("tests/test_scenes.py", [
        ("scenes: converse relation swapped", 'f"{self.things[1]} {RELATIONS[self.relation]} {self.things[0]}"',
         'f"{self.things[0]} {RELATIONS[self.relation]} {self.things[1]}"'),
        ("scenes: left is right", '"left": (-1, 0), "right": (1, 0)', '"left": (1, 0), "right": (-1, 0)'),
        ("scenes: the wall is near at the top", "(1 + y) / bottom + (1 - y) / top", "(1 - y) / bottom + (1 + y) / top"),
        ("scenes: things below the floor", "thing.depth < scene.wall_depth(thing.y + thing.radius)", "True"),
        ("scenes: the far thing first", "sorted(rng.uniform(2.6, 6, 3))", "sorted(rng.uniform(2.6, 6, 3))[::-1]"),
        ("scenes: the front one drawn first", "in reversed(scene.things)", "in scene.things"),
        ("scenes: labels of the wrong thing", "enumerate(self.things, start", "enumerate(reversed(self.things), start"),
        ("scenes: seeds overlap", "default_rng((self.seed, i))", "default_rng(self.seed + i)"),
        ("scenes: black and white swapped", '(0, 0, 0), "white": (255, 255, 255', '(255, 255, 255), "white": (0, 0, 0'),
    ]),
    "toy/make_prior.py": ("tests/test_toy.py", [
        ("toy: standardise without the shift back", "decoder_start.bias += ", "decoder_start.bias -= "),
    ]),
    "toy/judge.py": ("tests/test_toy.py", [
        ("depth: ensemble is measured by its first", "torch.stack(members[:ensemble]).mean(0)", "members[0]"),
        ("toy: frechet trace sign", "B.trace() - 2 * root", "B.trace() + 2 * root"),
        ("toy: score counts what does not apply", "((predicted == labels) | (labels == -100)).all(1)",
         "(predicted == labels).all(1)"),
        ("toy: black and white swapped", "return (pictures.clamp(-1, 1)", "return (-pictures.clamp(-1, 1)"),
        ("toy: all scenes at one time", "spread_times(len(world), sd.device)", "spread_times(1, sd.device)"),
    ]),
    "claims/report.py": ("tests/test_claims.py", [
        ("claims: table of maxima", "(fmean(values), min(values)", "(max(values), min(values)"),
        ("claims: numbers sorted as words", '(0, float(text), "")', "(0, 0.0, text)"),
        ("claims: scenes do not scatter", "in differences.mean(1), differences.mean(0):", "in [differences.mean(1)]:"),
        ("claims: seeds do not scatter", "in differences.mean(1), differences.mean(0):", "in [differences.mean(0)]:"),
        ("claims: two seeds have an interval", "(trained and seeds < 3)", "(trained and seeds < 2)"),
        ("claims: degrees of freedom of the seeds alone", "variance**2 / sum(part**2 / own for part, own in parts)",
         "parts[0][1]"),
        ("claims: a model before training has no pair", "theirs.keys() == {None}", "False"),
        ("claims: one-sided p-values", "2 * stats.t.sf(abs(mean)", "stats.t.sf(abs(mean)"),
        ("claims: fm hides the others", "(line[-1] == APART) == is_apart", "not is_apart"),
        ("claims: ratio to all objectives", "if str(look_up(row, args.by.name)) == args.against]", "]"),
        ("claims: relative to ours", "theirs.mean() if of.name", "ours.mean() if of.name"),
    ]),
    "claims/levels.py": ("tests/test_claims.py", [
        ("claims: levels the other way", "BOUNDS) - 1\n", "BOUNDS[::-1])\n"),
        ("claims: weights of a v-network for eps", 'of_v if prediction == "v" else of_eps', "of_v"),
        ("claims: fm-flip's levels are diff2flow's", "by_level(runs[name], dm)",
         'by_level(runs["diff2flow"], dm)'),
        ("claims: all weights are the paper's", "if objective in WEIGHTS:", "if False:"),
        ("claims: min-snr has dm's weights", "weight = min_snr(t_fm)", "weight = t_fm / t_fm"),
    ]),
    "claims/verdicts.py": ("tests/test_claims.py", [
        ("verdicts: less is better", "if mean * measure.better > 0", "if mean > 0"),
        ("verdicts: level by the mean alone", "abs(mean) + half <= measure.margin", "abs(mean) <= measure.margin"),
        ("verdicts: Bonferroni's correction", "if one.p > level / (len(decided) - k)",
         "if one.p > level / len(decided)"),
        ("verdicts: no correction", "if one.p > level / (len(decided) - k)", "if one.p > level"),
    ]),
    "claims/weighted.py": ("tests/test_claims.py", [
        ("weighted: no weight", "self.weight(t_fm).view(-1, 1, 1, 1) * (u", "(u"),
        ("weighted: the ceiling of an error of u", "(5 * t_fm**2).clamp(max=1)", "(5 * t_fm).clamp(max=1)"),
        ("weighted: min-SNR upside down", "((1 - t_fm) / t_fm)", "(t_fm / (1 - t_fm))"),
        ("weighted: times before noise", """        x0 = torch.randn_like(x1) if x0 is None else x0
        t_fm = torch.rand(len(x1), device=x1.device) if t_fm is None else t_fm
        u =""", """        t_fm = torch.rand(len(x1), device=x1.device) if t_fm is None else t_fm
        x0 = torch.randn_like(x1) if x0 is None else x0
        u ="""),
    ]),
    "claims/solvers.py": ("tests/test_claims.py", [
        ("solvers: midpoint at the start", "u(x + h / 2 * u(x, t), t + h / 2)", "u(x + h / 2 * u(x, t), t)"),
        ("solvers: Heun is Euler", "x + h / 2 * (first + u(x + h * first, t + h))", "x + h * first"),
        ("solvers: a step is a call", "calls // SOLVERS[solver]", "calls"),
        ("solvers: guided away", "without + cfg * (with_text - without)", "with_text + cfg * (without - with_text)"),
    ]),
    "claims/page.py": ("tests/test_claims.py", [
        ("claims: a stale table stays", "match[0].removesuffix(match[2]) + table", "match[0]"),
    ]),
}
SDXL = {  # of the same files, for tests/test_sdxl.py
    "model.py": [
        ("sdxl: width before height", "own[0::4], own[1::4] = height, width", "own[0::4], own[1::4] = width, height"),
        ("sdxl: the given sizes are ignored", "torch.where(sizes[:, :1] > 0, sizes, own)", "own.expand(len(row), 6)"),
        ("sdxl: multiples of 256 and rest exchanged", "256 * sizes[:, :6] + sizes[:, 6:]",
         "sizes[:, :6] + 256 * sizes[:, 6:]"),
        ("sdxl: the vector's layers are bf16", '("time_embed", "label_emb")', '("time_embed",)'),
        ("sdxl: no vector", "embedding + self.label_emb(self.vector(x, row).to(embedding.dtype))", "embedding"),
        ("sdxl: SD's scale", "0.13025 if self.is_xl else 0.18215", "0.18215"),
        ("sdxl: one block in the middle", "max(1, *config.transformer_depth)),", "1),"),
        ("sdxl: a layer more of the first encoder", "self.config.text_layers - 1)", "self.config.text_layers)"),
        ("sdxl: a layer more of the second", "self.config.pooled_layers - 1)", "self.config.pooled_layers)"),
        ("sdxl: pooled without the final norm", "last = tower.ln_final(tower.", "last = (tower."),
        ("sdxl: the last row is pooled", "end = ids.argmax(-1)", "end = ids.argmax(-1) * 0 + 76"),
        ("sdxl: projection transposed", "end] @ tower.text_projection", "end] @ tower.text_projection.T"),
        ("sdxl: encoders exchanged", "torch.cat([states, before], dim=-1)", "torch.cat([before, states], dim=-1)"),
        ("sdxl: quick_gelu in the second", "config.vocabulary, open_clip=True,", "config.vocabulary, open_clip=False,"),
    ],
    "data.py": [
        ("sdxl: left before top", "round(top * scale), round(left * scale)", "round(left * scale), round(top * scale)"),
        ("sdxl: the crop's place before scaling", "round(top * scale), round(left * scale)", "round(top), round(left)"),
        ("sdxl: a mirrored picture keeps its left", "image.width - right if is_mirrored else left", "left"),
    ],
    "train.py": [("sdxl: training ignores the sizes", 'if "sizes" in batch:', "if False:")],
    "support/checkpoint.py": [
        ("sdxl: a folder's projection is not transposed", 'tensor.T if stored == "text_projection.weight" else tensor',
         "tensor"),
        ("sdxl: v_pred is not saved", 'tensors |= {"v_pred": torch.zeros(0)} if sd.prediction == "v" else {}', "pass"),
        ("sdxl: metadata before v_pred", ' and "prediction" not in file.metadata and "v_pred" in file.shapes',
         ' and not file.metadata and "v_pred" in file.shapes'),
    ],
    "support/lora_file.py": [
        ("sdxl: a LoRA has diffusers' names", "path if unet.config.is_xl else unet_path(path, unet.config)",
         "unet_path(path, unet.config)"),
        ("sdxl: both encoders' adapters in the first", '("second_" if match["second"] else "")', '""'),
    ],
    "support/load.py": [("sdxl: 512 pixels", '"1024" if sd.config.is_xl else "512"', '"512"')],
}
MUTATIONS = [(name, file, old, new, tests)
             for file, (tests, changes) in ROOMS.items() for name, old, new in changes]
MUTATIONS += [(name, file, old, new, "tests/test_sdxl.py")
              for file, changes in SDXL.items() for name, old, new in changes]


def run_tests(tree, tests, timeout, mutation=None):
    """Run `tests` in a copy of `tree`, mutated if a mutation is given -> what happened, the test that failed first.

    What happened is "survived" (all tests pass), "killed" (a test fails), "timeout", or "error": no test could run.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", ".pytest_cache"))
        if mutation:
            _, file, old, new, _ = mutation
            (copy / file).write_text((copy / file).read_text().replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tests"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(command + shlex.split(tests), cwd=copy, env=environment, start_new_session=True,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)      # pytest and the commands that its tests have started
            process.communicate()
            return "timeout", ""
    failed = re.search(r"^(?:FAILED|ERROR) \S*?::(\S+)", output, re.MULTILINE)
    happened = {0: "survived", 1: "killed"}.get(process.returncode, "error")
    return happened, failed[1] if failed else output[-2000:] if happened == "error" else ""


def main(mutations=MUTATIONS, tree=Path(__file__).parent.parent):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of the mutations to run (default: all)")
    parser.add_argument("--tree", default=tree, help=f"folder of the code (default: {tree})")
    parser.add_argument("--tests", help="pytest's arguments, instead of each mutation's own tests")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time (default: 1)")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for the tests of one (default: 1200)")
    parser.add_argument("--out", help="JSON file to update with {name: what happened}")
    args = parser.parse_args()
    chosen = [m for m in mutations if not args.names or any(part in m[0] for part in args.names)]
    for name, file, old, _, _ in chosen:
        found = (Path(args.tree) / file).read_text().count(old)
        assert found == 1, f"{name}: {file} has its old text {found} times: {old!r}"
    assert len({name for name, *_ in mutations}) == len(mutations), "two mutations have one name"

    tests = args.tests or shlex.join(dict.fromkeys(word for *_, tests in chosen for word in shlex.split(tests)))
    happened, failed = run_tests(args.tree, tests, args.timeout * 10)
    assert happened == "survived", f"without any mutation the tests must pass: {happened}, {failed}"
    print(f"without any mutation the tests pass; {len(chosen)} mutations", flush=True)

    def measure(mutation):
        start = time.time()
        happened, failed = run_tests(args.tree, args.tests or mutation[-1], args.timeout, mutation)
        print(f"{happened:8} {time.time() - start:4.0f} s  {mutation[0]:45} {failed}", flush=True)
        return happened

    results = json.loads(Path(args.out).read_text()) if args.out and Path(args.out).exists() else {}
    counts = dict.fromkeys(["killed", "survived", "timeout", "error"], 0)
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutation, happened in zip(chosen, pool.map(measure, chosen)):
            counts[happened] += 1
            results[mutation[0]] = happened
            if args.out:
                Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    print(f"{len(chosen)} mutations: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    sys.exit(counts["killed"] != len(chosen))


if __name__ == "__main__":
    main()
