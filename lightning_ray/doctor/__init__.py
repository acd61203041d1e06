"""The compatibility check: runs an unmodified agent and says what a trainer would see of it.

Owns the tap that notes what an agent asks and is answered, the checks, and their report. The checks
read what every other room recorded (how the agent ended, its requests, its exact tokens), so this
room stands above them all; it must not know how anybody learns. It trains nothing.
"""

from lightning_ray.doctor.config import DoctorConfig, check_doctor
from lightning_ray.doctor.examine import Doctor
from lightning_ray.doctor.finding import Finding, Level, Report

__all__ = ["Doctor", "DoctorConfig", "Finding", "Level", "Report", "check_doctor"]
