"""Shipped job files for published models: `swift_dist/recipes/<model>-<gpus>gpu.yaml`, and the verbs that show them."""

from swift_dist.recipes.catalogue import (
    ListOptions,
    ShowOptions,
    list_recipes,
    list_verb,
    read_recipe,
    recipe_path,
    render_list,
    render_show,
    show_verb,
)

__all__ = [
    "ListOptions",
    "ShowOptions",
    "list_recipes",
    "list_verb",
    "read_recipe",
    "recipe_path",
    "render_list",
    "render_show",
    "show_verb",
]
