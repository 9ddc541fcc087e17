"""What --resume reads: state.safetensors holds a run's settings, parameters, their EMA, Adam's averages and the
step."""
import argparse
import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch

from support.files import from_json, open_tensors, save_tensors
from support.folders import files_in

STEERABLE = ("steps", "lr", "save_every", "preview_every", "device", "workers")     # flags that --resume may change
MOVABLE = ("out", "data", "ckpt", "init_lora", "cache")             # paths that may change, to the same files elsewhere


# ------------------------------------------------------------------ settings

def given_flags(parser, args):
    """-> {name: value} of the flags that are on the command line, without defaults."""
    unset = object()
    given = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    return {name: value for name, value in given.items() if value is not unset}


def state_file(folder):
    path = Path(folder) / "state.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --resume takes the folder of a run that has saved")
    return path


def saved_settings(folder):
    """-> the settings of the run in `folder`, {name: value}. ValueError for a damaged state."""
    path = state_file(folder)
    with open_tensors(path) as file:
        metadata = file.metadata()
    try:
        settings = from_json(metadata["args"])
        if not isinstance(settings["task"], str) or int(metadata["step"]) < 0:
            raise ValueError(f"task {settings['task']}, step {metadata['step']}")
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not written by train.py ({error})") from error
    if settings["task"] == "depth" and metadata.get("version") == "1":
        raise ValueError(f"{path}: a depth run of an earlier version, whose UNet took its inputs in another order: "
                         "start a new run from its weights, with --init-lora or --ckpt")
    return settings


def parsed_again(parser, settings, known, path, positional=()):
    """-> saved settings, parsed again as a command line, after the positional words. ValueError for settings that are
    not `known`, and for values that the parser refuses."""
    def refuse(message):
        raise ValueError(f"{path}: not written by train.py ({message})")

    words = list(positional)
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if name not in known:
            refuse(f"unknown setting {name}")
        if name == "prompt" and isinstance(value, list):        # the one flag that is repeated
            words += [f"{flag}={prompt}" for prompt in value]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
            if any(word.startswith("-") for word in map(str, value)):
                refuse(f"{name} {value}")
        elif value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    parser.error = refuse
    return parser.parse_args(words)


def resumed_arguments(parser, args, tasks):
    """-> the arguments of the run in args.resume, with the flags that may change. ValueError for a run of another
    task, and for files of it that are gone."""
    given = given_flags(parser, args)
    settings = resumed_settings(args.resume, given, (*STEERABLE, *MOVABLE))
    if settings["task"] not in tasks:
        raise ValueError(f"--resume {args.resume}: a run of toy.make_prior; resume it with that program")
    resumed = parsed_again(parser, settings, vars(args), state_file(args.resume))
    gone = {}
    for name in ("data", "ckpt", "init_lora", "cache"):
        paths = [] if name in given else getattr(resumed, name) or []
        for path in paths if isinstance(paths, list) else [paths]:
            if not os.path.exists(os.path.dirname(path) if path.endswith(".tar") else path):
                gone[path] = "--" + name.replace("_", "-")
    if gone:
        raise ValueError(f"{', '.join(gone)}: no such file or folder; if the files of the run have moved, pass "
                         f"{' and '.join(sorted(set(gone.values())))} with --resume")
    resumed.given = sorted(given)
    return resumed


def resumed_settings(folder, given, may_change):
    """-> the settings of the run in `folder`, updated by the `given` flags. ValueError for a flag not in may_change."""
    settings = {**saved_settings(folder), "out": None, "resume": None}      # the folder may have moved since its start
    for name, value in given.items():
        if name in ("resume", "task") and settings.get(name) in (None, value):
            continue
        flag = "--" + name.replace("_", "-")
        if name not in may_change:
            raise ValueError(f"{flag}: a resumed run keeps its settings; with --resume you can change "
                             f"{', '.join('--' + word.replace('_', '-') for word in may_change)}")
        if settings.get(name) != value and name not in MOVABLE:
            print(f"{flag} {value} instead of {settings.get(name)}")
    return {**settings, **given}


@contextlib.contextmanager
def named(folder):
    """Inside `with`, a ValueError names the state of the resumed run in `folder`; None for a new run."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{state_file(folder)}: {error}" if folder else str(error)) from None


def saved_step(folder):
    """-> how many steps the run in `folder` has done."""
    with open_tensors(state_file(folder)) as file:
        return int(file.metadata()["step"])


# ------------------------------------------------------------------ tensors

def names_hash(folders):
    """-> hash of all file names in the folders, to detect changed data on resume; of tars, the hash of their names."""
    names = hashlib.sha256()
    for folder in folders or []:
        if folder.endswith(".tar"):
            names.update(os.path.basename(folder).encode(errors="surrogateescape"))
        listed = "\n".join(path.removeprefix(folder) for path in files_in(folder))
        names.update(listed.encode(errors="surrogateescape"))
    return names.hexdigest()


def state_size(ema):
    """-> about how many bytes a state will have: parameters, their EMA, and Adam's two averages."""
    return 4 * sum(parameter.numel() * parameter.element_size() for parameter in ema.trained.values())


def save_state(out, args, step, ema, optimizer, **about):
    """Write state.safetensors: parameters, their EMA, Adam's state; about {str: str} describes base and data."""
    tensors = {}
    for name, parameter in ema.trained.items():
        tensors[f"parameter/{name}"], tensors[f"average/{name}"] = parameter, ema.average[name]
        for key, value in optimizer.state[parameter].items():
            tensors[f"adam/{key}/{name}"] = value
    settings = {name: value for name, value in vars(args).items() if name != "given"}
    metadata = {"args": json.dumps(settings), "step": str(step), "version": "2", **about}
    save_tensors(out / "state.safetensors", tensors, metadata)


def fitting(path, file, key, parameter):
    """-> tensor `key` of the state in `file`. ValueError if its shape or dtype is not the parameter's."""
    tensor = file.get_tensor(key)
    if (tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype) or not tensor.isfinite().all():
        raise ValueError(f"{path}: {key} {list(tensor.shape)} does not fit the model's {list(parameter.shape)}, or is "
                         "not finite: a damaged file; start the run again in another --out")
    return tensor


def restore(path, ema, optimizer, moved=(), **about):
    """Load a state into the parameters, their EMA and Adam. ValueError for the state of another model or another base
    than in `about`. If the data changed: a ValueError if "data" is in `moved`, else a warning."""
    with open_tensors(path) as file, torch.no_grad():
        stored, metadata = set(file.keys()), file.metadata()
        if metadata.get("base_hash", about.get("base_hash")) != about.get("base_hash"):
            raise ValueError(f"{path}: the run's base was another checkpoint (UNet {metadata['base_hash'][:10]}, now "
                             f"{about['base_hash'][:10]}): was the file replaced?")
        if {key for key in stored if key.startswith("parameter/")} != {f"parameter/{name}" for name in ema.trained}:
            raise ValueError(f"{path}: the state of another model; was the checkpoint replaced?")
        of_adam = [{key.rpartition("/")[2] for key in stored if key.startswith(f"adam/{kind}/")}
                   for kind in ("step", "exp_avg", "exp_avg_sq")]
        if not of_adam[0] == of_adam[1] == of_adam[2] != set():
            raise ValueError(f"{path}: a part of Adam's state is missing: start the run again in another --out")
        if metadata.get("data", about.get("data")) != about.get("data"):
            if "data" in moved:
                raise ValueError(f"--data: its files have other names than those of the run in {path.parent}; pass the "
                                 "same files at another place, or start a new run with --init-lora")
            print("warning: files were added to --data or removed since the run began: the order of the rest changes")
        for name, parameter in ema.trained.items():
            parameter.copy_(fitting(path, file, f"parameter/{name}", parameter))
            ema.average[name].copy_(fitting(path, file, f"average/{name}", parameter))
            if f"adam/step/{name}" in stored:  # absent for parameters without a gradient: OpenCLIP's last layer
                state = {"step": fitting(path, file, f"adam/step/{name}", torch.tensor(0.0)).to(parameter.device)}
                for key in ("exp_avg", "exp_avg_sq"):
                    average = fitting(path, file, f"adam/{key}/{name}", parameter)
                    state[key] = torch.empty_like(parameter).copy_(average)    # in the parameter's memory format
                optimizer.state[parameter] = state
