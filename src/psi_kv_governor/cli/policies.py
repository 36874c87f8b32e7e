"""`psi-kv policies`: the policies that can be chosen, with where each comes from."""

from __future__ import annotations

import click
import msgspec

from psi_kv_governor.cli._group import example
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.policy.registry import POLICIES, about, all_policies, plug_ins


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One policy, as `--json` shows it."""

    name: str
    about: str
    source: str
    needs: list[str]
    """Evidence that the cache has to give."""
    default: bool
    plug_in: bool


@click.command(
    "policies",
    short_help="List the policies: which tokens go first.",
    epilog=example("psi-kv policies", "psi-kv run --policy keydiff 'Once upon a time'"),
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the policies: which tokens go first when memory is short. * marks the default.

    Choose one with --policy NAME, PSI_KV_POLICY=NAME or policy = "NAME" in psi-kv.toml.
    """
    default = GovernorConfig().policy
    policies = [
        Listed(
            name=name,
            about=about(policy),
            source=policy.source,
            needs=sorted(policy.needs),
            default=name == default,
            plug_in=name not in POLICIES,
        )
        for name, policy in all_policies().items()
    ]
    broken = plug_ins()[1]
    if as_json:
        click.echo(msgspec.json.encode({"policies": policies, "broken": dict(broken)}))
        return
    width = max(len(policy.name) for policy in policies)
    for policy in policies:
        mark = "*" if policy.default else " "
        click.echo(f"{mark} {policy.name:<{width}}  {policy.about} [{policy.source}]")
    for name, why in broken.items():
        click.echo(f"  {name} can't be used: {why}", err=True)
