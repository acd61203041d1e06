"""lightning-ray release: which version of a policy serves, and taking it back.

    lightning-ray release status [POLICY]
    lightning-ray release canary POLICY VERSION [share=0.1] [reason="..."]
    lightning-ray release promote POLICY [VERSION] [reason="..."]
    lightning-ray release rollback POLICY [reason="..."]

VERSION is a number of `status`, RUN/N, or `latest`. The store is that of `output_dir=`, or
`tracking.uri=`.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_ray.errors import UserError
from lightning_ray.policies import Release, Releases
from lightning_ray.policies.releases import canary, promote, rollback
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import TrainConfig

_KEYS = ("share", "reason", "by", "output_dir", "tracking.uri")
_DEFAULT_SHARE = 0.1
_SHOWN = 12


def main(arguments: Sequence[str]) -> None:
    """Shows or moves the pointers of a policy. Raises UserError for what the user can mend."""
    words, settings = _split(arguments)
    action, *rest = words or ["status"]
    uri = settings.get("tracking.uri") or default_uri(
        Path(settings.get("output_dir", TrainConfig.output_dir))
    )
    releases = Releases(uri)
    if action == "status":
        for policy in rest or releases.policies():
            _show(releases, policy)
        if not rest and not releases.policies():
            print("no policy has a version yet: train one first")
        return
    if action not in ("canary", "promote", "rollback"):
        raise UserError(f"release {action}: write status, canary, promote or rollback")
    if not rest:
        names = ", ".join(releases.policies()) or "none yet"
        raise UserError(f"release {action}: name the policy; there are: {names}")
    policy, *named = rest
    now = releases.get(policy)
    if action == "canary":
        if not named:
            raise UserError("release canary POLICY VERSION: name the version to try")
        to = canary(now, releases.find(policy, named[0]), _share(settings))
    elif action == "promote":
        to = promote(now, releases.find(policy, named[0]) if named else None)
    else:
        to = rollback(now)
    kept = releases.change(policy, to, settings.get("reason", ""), settings.get("by"))
    print(_in_words(policy, kept))


def _share(settings: dict[str, str]) -> float:
    text = settings.get("share", str(_DEFAULT_SHARE))
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"share={text}: give a number between 0 and 1") from error


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    words = [argument for argument in arguments if "=" not in argument]
    settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for key in settings:
        if key not in _KEYS:
            raise UserError(f"release {key}=: no such setting; there are: {', '.join(_KEYS)}")
    return words, settings


def _in_words(policy: str, release: Release) -> str:
    champion = "no version" if release.champion is None else f"version {release.champion}"
    text = f"{policy}: {champion} serves"
    if release.candidate is not None:
        text += f", version {release.candidate} takes {release.share:.0%} of new conversations"
    return text


def _show(releases: Releases, policy: str) -> None:
    release = releases.get(policy)
    versions = releases.versions(policy)
    console = Console(soft_wrap=True)
    console.print(_in_words(policy, release), highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("version", "release", "run", "number", "step", "from", "made by", "weights"):
        table.add_column(heading)
    roles = dict.fromkeys(release.earlier, "earlier")
    if release.candidate is not None:
        roles[release.candidate] = f"candidate {release.share:.0%}"
    if release.champion is not None:
        roles[release.champion] = "champion"
    shown = [v for v in versions if v in roles or v in list(versions)[-_SHOWN:]]
    for number in shown:
        version = versions[number]
        there = version.path.is_dir() if version.is_model else True
        table.add_row(
            str(number),
            roles.get(number, ""),
            version.run_id[:8],
            str(version.number),
            str(version.step),
            "" if version.parent is None else str(version.parent),
            version.created_by,
            "present" if there else "removed",
        )
    console.print(table)
    for change in releases.history(policy)[-5:]:
        why = f": {change.reason}" if change.reason else ""
        line = f"{change.at}  {change.action} by {change.by}{why}  ({_in_words(policy, change)})"
        console.print(line, highlight=False)
