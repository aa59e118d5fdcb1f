"""How a model's weights came about, in words for its card."""

from __future__ import annotations

from typing import Any

from ..text import code, markdown

__all__ = ["tell_origin"]


def tell_origin(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Where the weights come from, how they were trained, and which classes were added later.

    Args:
        config: Of the model folder.
        metrics: Likewise.

    Returns:
        Sentences in Markdown.
    """
    training, grown = metrics.get("training"), " ".join(map(_grown, metrics.get("added", [])))
    if training is None:
        source = metrics.get("source") or config.get("source") or config.get("base_model") or "a trained checkpoint"
        description = markdown(config["pretrained_cfg"].get("description", "converted"))
        return f"{description}. Source: `{code(source)}`. {grown or 'Nothing was trained.'}"
    recipe = training["recipe"]
    start = f"From the weights of `{code(recipe['model'])}`: " if recipe.get("pretrained") else ""
    processes = f" in {training['processes']} processes" if training.get("processes", 1) > 1 else ""
    commit = f", commit {code(training['commit'][:12])}" if training.get("commit") else ""
    return (
        f"{start}{training['steps']} steps on {training['train_images']} images in {training['hours']} hours on "
        f"{markdown(training['device'])}{processes}{commit}. {markdown(recipe.get('notes', ''))}".rstrip()
        + f" {grown}".rstrip()
    )


def _grown(session: dict[str, Any]) -> str:
    """How classes were added, in words."""
    names = session["classes"]
    shown = ", ".join(map(markdown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    text = (
        f"Then {len(names)} classes were added from {session['images']} images: {shown}. The neck alone was fitted, "
        f"{session['steps']} steps at a rate of {session['rate']:g}, to these and to the mean of each class before."
    )
    if session["before"] is not None:
        text += (
            f" Top-1 on test images of the classes that were there: {session['before']:.2f} % before, "
            f"{session['old']:.2f} % after"
        )
        text += f"; of the new ones {session['new']:.2f} %." if session["new"] is not None else "."
    if not session["rejects"]:
        text += " No threshold of familiarity was fitted: no held-out images were there."
    return text
