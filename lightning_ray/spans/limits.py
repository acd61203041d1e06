"""How much of somebody else's telemetry is taken in (Hydra group `gateway`, under `telemetry`)."""

from dataclasses import dataclass

from lightning_ray.errors import UserError


@dataclass
class TelemetryLimits:
    """What one request of telemetry may hold; who sends it is not trusted."""

    max_decoded_bytes: int = 64 * 1024 * 1024
    """Largest body after decompression, bytes."""
    max_spans: int = 10_000
    """Spans in one request."""
    max_span_bytes: int = 1024 * 1024
    """Largest single span, with its attributes, events and links, bytes."""
    max_attributes: int = 512
    """Attributes of one span, event or link, or of a resource."""
    max_value_bytes: int = 256 * 1024
    """Longest name or attribute value, bytes of text."""
    max_depth: int = 16
    """Lists and maps inside one another in one attribute."""
    max_concurrent: int = 8
    """Requests that one replica decodes at the same time; more are asked to come again."""
    max_clock_skew_s: float = 86_400.0
    """How far in the future a span's times may lie, seconds."""


def check_telemetry(limits: TelemetryLimits) -> None:
    """Raises UserError for limits under which nothing could be taken in."""
    least = {
        "max_decoded_bytes": 1024,
        "max_spans": 1,
        "max_span_bytes": 1024,
        "max_attributes": 1,
        "max_value_bytes": 64,
        "max_depth": 1,
        "max_concurrent": 1,
    }
    for name, minimum in least.items():
        if getattr(limits, name) < minimum:
            raise UserError(
                f"gateway.telemetry.{name}={getattr(limits, name)}: must be at least {minimum}"
            )
    if limits.max_depth > 64:
        raise UserError(
            f"gateway.telemetry.max_depth={limits.max_depth}: must be at most 64, the depth to "
            "which readers of JSON go everywhere"
        )
    if limits.max_clock_skew_s < 0:
        raise UserError(
            f"gateway.telemetry.max_clock_skew_s={limits.max_clock_skew_s}: must be 0 or above"
        )
