"""Services by eBPF: keeps the maps of the socket programs equal to Services and EndpointSlices."""

from agent.dataplane.settings import DataplaneSettings
from agent.dataplane.sync import Dataplane

__all__ = ["Dataplane", "DataplaneSettings"]
