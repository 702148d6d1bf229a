"""The tab *Models*: list, verify and delete the weights of models."""

import gradio as gr

from argen.hub import local_cache
from argen.hub.cards import all_cards
from argen.ui.context import AppContext, user_errors

HEAD = ["id", "kind", "where", "MB here", "M params", "licence", "what"]
WIDTHS = ["25%", "9%", "13%", "8%", "9%", "11%", "25%"]


TITLE = "Models"


def layout(context: AppContext, tab: gr.Tab) -> None:
    def model_rows() -> list[list]:
        rows = []
        for entry in local_cache.local_cache():
            model, size = all_cards()[entry.id], round(entry.bytes / 1e6, 1) if entry.folder else ""
            rows.append([entry.id, model.kind, entry.state, size, model.parameters or "", model.licence, model.about])
        return rows

    def select(rows: list[list], event: gr.SelectData) -> tuple:
        id = rows[event.index[0]][0]
        entry = next(entry for entry in local_cache.local_cache() if entry.id == id)
        place = f", in {entry.folder}" if entry.folder and context.admin is None else ""
        return id, f"Chosen: `{id}`{place}", gr.update(interactive=entry.downloaded)

    def verify(id: str | None) -> str:
        with user_errors():
            files = local_cache.verify(_selected(id))
        broken = [name for name, is_whole in files.items() if not is_whole]
        return f"**Broken or missing: {', '.join(broken)}**" if broken else f"All {len(files)} files of {id} are whole."

    def delete(id: str | None, request: gr.Request) -> tuple:
        with user_errors():
            context.check_admin(request)
            deleted = local_cache.delete(_selected(id))
        return f"Deleted from the disk: {', '.join(deleted)}.", model_rows(), gr.update(interactive=False)

    def set_offline(offline: bool, request: gr.Request) -> None:
        with user_errors():
            context.check_admin(request)
            local_cache.set_offline(offline)

    selected_id = gr.State(None)
    table = gr.Dataframe(
        headers=HEAD,
        type="array",
        interactive=False,
        show_label=False,
        wrap=True,
        column_widths=WIDTHS,
        elem_id="models",
    )
    selection = gr.Markdown("Chosen: none", elem_id="models-chosen")
    with gr.Row():
        verify_button = gr.Button("Verify files", elem_id="models-verify")
        delete_button = gr.Button("Delete download", variant="stop", interactive=False, elem_id="models-delete")
        refresh = gr.Button("Refresh", elem_id="models-look")
        offline = gr.Checkbox(local_cache.is_offline(), label="Offline: fetch nothing", elem_id="models-offline")
    status = gr.Markdown(elem_id="models-state")
    table.select(select, table, [selected_id, selection, delete_button])
    verify_button.click(verify, selected_id, status)
    delete_button.click(delete, selected_id, [status, table, delete_button])
    refresh.click(model_rows, None, table)
    offline.input(set_offline, offline, None)
    tab.select(model_rows, None, table)


def _selected(id: str | None) -> str:
    if id is None:
        raise ValueError("no model is selected: click on one in the table")
    return id
