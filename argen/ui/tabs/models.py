"""The tab of the weights: what there is, what is here, whether it is whole."""

import gradio as gr

from argen.hub import local_cache
from argen.hub.cards import all_cards
from argen.ui.context import AppContext, user_errors

HEAD = ["id", "kind", "where", "MB here", "million parameters", "licence", "what"]


TITLE = "Models"


def layout(context: AppContext, tab: gr.Tab) -> None:
    def rows() -> list[list]:
        found = []
        for one in local_cache.local_cache():
            model, size = all_cards()[one.id], round(one.bytes / 1e6, 1) if one.folder else ""
            found.append([one.id, model.kind, one.state, size, model.parameters, model.licence, model.about])
        return found

    def choose(found: list[list], event: gr.SelectData) -> tuple:
        id = found[event.index[0]][0]
        folder = next(one.folder for one in local_cache.local_cache() if one.id == id)
        return id, f"Chosen: `{id}`" + (f", in {folder}" if folder and context.admin is None else "")

    def verify(id: str | None) -> str:
        with user_errors():
            found = local_cache.verify(_chosen(id))
        broken = [name for name, whole in found.items() if not whole]
        return f"**Broken or missing: {', '.join(broken)}**" if broken else f"All {len(found)} files of {id} are whole."

    def delete(id: str | None, request: gr.Request) -> tuple:
        with user_errors():
            context.check_admin(request)
            gone = local_cache.delete(_chosen(id))
        return f"Deleted from the disk: {', '.join(gone)}.", rows()

    def set_offline(offline: bool, request: gr.Request) -> None:
        with user_errors():
            context.check_admin(request)
            local_cache.set_offline(offline)

    chosen = gr.State(None)
    table = gr.Dataframe(headers=HEAD, type="array", interactive=False, show_label=False, wrap=True, elem_id="models")
    which = gr.Markdown("Chosen: none", elem_id="models-chosen")
    with gr.Row():
        check = gr.Button("Check its files", elem_id="models-verify")
        drop = gr.Button("Delete what was downloaded", variant="stop", elem_id="models-delete")
        look = gr.Button("Refresh", elem_id="models-look")
        offline = gr.Checkbox(local_cache.is_offline(), label="Offline: fetch nothing", elem_id="models-offline")
    told = gr.Markdown(elem_id="models-state")
    table.select(choose, table, [chosen, which])
    check.click(verify, chosen, told)
    drop.click(delete, chosen, [told, table])
    look.click(rows, None, table)
    offline.input(set_offline, offline, None)
    tab.select(rows, None, table)


def _chosen(id: str | None) -> str:
    if id is None:
        raise ValueError("no model is chosen: click on one in the table")
    return id
