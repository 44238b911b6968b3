"""CustomResourceDefinitions as far as they are looked at: whose group a kind is of.

Source: Kubernetes API reference, apiextensions.k8s.io/v1.
"""

from __future__ import annotations

from typing import ClassVar

from api.meta import Kind, Resource, Struct


class DefinitionSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a CustomResourceDefinition."""

    group: str = ""
    """The API group of the kind."""


class Definition(Resource, frozen=True, kw_only=True):
    """A CustomResourceDefinition; deleting it deletes all objects of its kind."""

    TYPE: ClassVar[Kind] = Kind(
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        namespaced=False,
        partial=True,
    )
    spec: DefinitionSpec = DefinitionSpec()
