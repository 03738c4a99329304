"""Registries with one encoder, as the registry's own tests have them."""

from tests.tracking.registry.conftest import registry, template_registry

__all__ = ["registry", "template_registry"]
