"""From what was typed to a checked, typed configuration; every mistake is one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lightning_ray.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"


def compose_config(name: str, schema: type[Any], overrides: Sequence[str]) -> Any:
    """The configuration `configs/NAME.yaml` with Hydra overrides, as an instance of `schema`.

    Raises UserError, with one line, for an unknown key or group, a wrong type, a missing value.
    """
    _check_words(overrides)
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            composed = compose(config_name=name, overrides=list(overrides))
        # Once more into the schema: `+key=value` adds keys that it does not have.
        plain = OmegaConf.to_container(composed, resolve=False)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key}: a value is needed; set it, or choose an experiment={_choices()}"
        ) from error
    except OverrideParseException as error:
        raise _unreadable(error) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        message = _one_line(error)
        if message.startswith("Ambiguous value"):
            message += ": it names several; --multirun runs each, quotes make it one"
        raise UserError(message) from error


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every child of a multirun: the product of what was typed.

    Choices (`a=1,2`), `choice()`, `range()`, `shuffle()` and `glob()` mean what they mean to Hydra,
    whose own parser and basic sweeper expand them.

    Raises UserError when an override cannot be read, or names nothing to run.
    """
    _check_words(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
            empty = [
                override.input_line
                for override in parsed
                if override.is_discrete_sweep() and not list(override.sweep_string_iterator())
            ]
            if empty:
                raise UserError(f"{empty[0]}: matches nothing, so there is no child to run")
            return BasicSweeper.split_arguments(parsed, None)[0]
    except OverrideParseException as error:
        raise _unreadable(error) from error
    except (HydraException, ValueError) as error:
        raise UserError(f"{_one_line(error)}; use a list, choice(), range() or glob()") from error


def override_value(overrides: Sequence[str], key: str) -> Any:
    """What the last of the overrides sets `key` to, quotes and escapes resolved; None if none does.

    Raises UserError when it cannot be read.
    """
    words = [word for word in overrides if word.lstrip("+").partition("=")[0] == key]
    if not words:
        return None
    try:
        return OverridesParser.create().parse_override(words[-1]).value()
    except OverrideParseException as error:
        raise _unreadable(error) from error


def _check_words(overrides: Sequence[str]) -> None:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not key.strip("+~ ") or not (equals or key.startswith("~")):
            raise UserError(
                f"{override!r} is no setting: write KEY=VALUE, for example training.steps=30"
            )


def _unreadable(error: OverrideParseException) -> UserError:
    return UserError(
        f"{error.override!r} cannot be read ({_one_line(error)}); write KEY=VALUE, and a value "
        "with brackets or commas as KEY='\"VALUE\"'"
    )


def resolved(config: Any) -> dict[str, Any]:
    """A configuration as plain values, for keeping beside a run."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _choices() -> str:
    return "|".join(sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))


def _one_line(error: BaseException) -> str:
    """Hydra's message without its continuation lines, and the most telling cause in front."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    key = getattr(cause, "full_key", None)
    if key and str(key) not in message:
        message = f"{key}: {message}"
    own = str(error).splitlines()[0].strip()
    if own != message and "override" in own.lower() and own not in message:
        message = f"{own.rstrip('.')}: {message}"
    if "is not in struct" in message and key:
        # A mapping of the user's own, to which a key is added and not changed.
        return f"{message}; to add a key write +{key}=VALUE"
    # Hydra lists the options of a group one a line, below this heading.
    for place, line in enumerate(lines):
        if line.startswith("Available options"):
            return f"{message.rstrip('.')}; {line} {', '.join(_until_config(lines[place + 1 :]))}"
    return message


def _until_config(lines: Sequence[str]) -> list[str]:
    """The options among what follows their heading: the lines before Hydra's search path."""
    options = []
    for line in lines:
        if line.startswith("Config search path"):
            break
        options.append(line)
    return options
