"""The queue and what it keeps: order, cancel and resume, restart, search."""

import json
import threading
import time
import zipfile
from dataclasses import replace

import pytest
import torch
from PIL import Image

from argen.jobs.queue import MAX_WAITING_JOBS, Forbidden, QueueFull, Studio
from argen.jobs.store import CANCELLED, DONE, FAILED, MISSING, WAITING, Store
from argen.metadata import read_grid, read_request
from argen.request import Request
from argen.words import MAX_PROMPT

SEQUENTIAL = Request("a pizza", sampler="sequential", seed=3)


@pytest.fixture
def studio(tmp_path, pipe):
    instance = Studio(tmp_path / "pictures", lambda name: pipe)
    yield instance
    instance.close()


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_job_becomes_images_that_make_themselves_again(studio, pipe):
    id = studio.submit(replace(SEQUENTIAL, num_images=2))
    done = studio.result(id, timeout=60)
    assert (done.state, done.decided, done.cells, done.share) == (DONE, 64, 64, 1.0)
    assert [saved.request.seed for saved in done.images] == [3, 4]
    *_, alone = pipe.run(done.images[1].request)
    file = studio.store.file(done.images[1].id)
    assert Image.open(file).tobytes() == alone.images[0].tobytes()
    assert read_request(file) == done.images[1].request
    assert read_grid(Image.open(file)) == done.images[1].tokens
    assert "CFG scale: 1.5, Seed: 4" in Image.open(file).info["parameters"]
    assert studio.store.thumbnail(done.images[1].id).size == (256, 256)


def test_a_cancelled_job_keeps_its_tokens_and_goes_on(studio):
    whole = studio.result(studio.submit(SEQUENTIAL)).images[0]
    id = studio.submit(SEQUENTIAL)
    for now in studio.watch(id, preview=True):
        if now.decided >= 20 and now.preview:
            studio.cancel(id)
    assert now.state == CANCELLED
    assert 20 <= now.decided < 64
    assert not now.images
    assert studio.store.resume_file(id).is_file()
    studio.resume(id)
    done = studio.result(id, timeout=60)
    assert done.state == DONE
    assert done.forward_passes == 64 - now.decided
    assert done.images[0].tokens == whole.tokens
    assert not studio.store.resume_file(id).exists()
    with pytest.raises(ValueError, match="the job is done: only one that was cancelled"):
        studio.resume(id)


def test_the_line_is_moved_paused_and_cancelled(studio):
    studio.pause()
    first, second, third = (studio.submit(replace(SEQUENTIAL, seed=seed)) for seed in range(3))
    assert [one.id for one in studio.queue()] == [first, second, third]
    studio.move(third, -2)
    studio.cancel(second)
    assert [(one.id, one.place) for one in studio.queue()] == [(third, 1), (first, 2)]
    assert studio.progress(second).state == CANCELLED
    studio.pause(False)
    for id in (third, first):
        assert studio.result(id, timeout=60).state == DONE
    times = [studio.store.job(id)["finished"] for id in (third, first)]
    assert times[0] < times[1]
    assert studio.queue() == []


def test_a_job_rests_at_a_token(studio):
    id = studio.submit(SEQUENTIAL)
    until(lambda: studio.progress(id).decided >= 5)
    studio.pause()
    until(lambda: studio.progress(id).stage == "paused")
    before = studio.progress(id).decided
    time.sleep(0.3)
    assert studio.progress(id).decided == before < 64
    studio.pause(False)
    assert studio.result(id, timeout=60).state == DONE


def test_again_takes_the_seeds_that_follow(studio):
    id = studio.submit_next_seeds(studio.submit(replace(SEQUENTIAL, num_images=2)))
    assert [saved.request.seed for saved in studio.result(id).images] == [5, 6]


def test_a_killed_studio_finds_its_jobs_again(tmp_path, pipe):
    """One was in the middle, one waited; a third is finished."""
    first = Studio(tmp_path, lambda name: pipe)
    done = first.submit(SEQUENTIAL)
    first.result(done)
    running, waiting = first.submit(SEQUENTIAL), first.submit(replace(SEQUENTIAL, seed=8))
    until(lambda: first.progress(running).decided > 3)
    first.store.update_job(running, state="running")  # as a kill leaves it
    first.close()
    first = Store(tmp_path)
    first.update_job(running, state="running")
    first.close()
    second = Studio(tmp_path, lambda name: pipe)
    try:
        assert second.result(running, timeout=60).state == second.result(waiting, timeout=60).state == DONE
        assert len(second.progress(done).images) == 1
        assert len(second.store.images()) == 3
    finally:
        second.close()


def test_a_job_killed_between_its_images_and_its_end_has_them_once(studio):
    id = studio.submit(replace(SEQUENTIAL, num_images=2))
    before = studio.result(id).images
    with studio.changed:
        studio.store.update_job(id, state=WAITING)
        studio.changed.notify_all()
    after = studio.result(id, timeout=60).images
    assert [saved.id for saved in after] == [saved.id for saved in before]
    assert len(list(studio.store.folder.glob("*.png"))) == 2


def test_what_cannot_be_drawn_fails_alone(tmp_path, pipe):
    def models(name):
        if name == "dalle-mini":
            raise RuntimeError("no memory")
        if name == "dalle-mega":
            raise FileNotFoundError("it is not here")
        return pipe

    studio = Studio(tmp_path, models)
    try:
        jobs = [
            studio.submit(replace(SEQUENTIAL, model=name)) for name in ("dalle-mini", "dalle-mega", "argen/emoji-parti")
        ]
        results = [studio.result(id, timeout=60) for id in jobs]
        assert [one.state for one in results] == [FAILED, FAILED, DONE]
        assert [one.error for one in results] == ["RuntimeError: no memory", "it is not here", ""]
        with pytest.raises(KeyError, match="there is no job"):
            studio.progress("none")
    finally:
        studio.close()


def test_everybody_has_a_line_of_their_own(studio, monkeypatch):
    monkeypatch.setattr("argen.jobs.queue.MAX_WAITING_JOBS", 2)
    assert MAX_WAITING_JOBS == 1000
    studio.pause()
    mine = [studio.submit(SEQUENTIAL, "a") for _ in range(2)]
    with pytest.raises(QueueFull, match="2 jobs are waiting"):
        studio.submit(SEQUENTIAL, "a")
    studio.submit(SEQUENTIAL, "b")
    assert [one.id for one in studio.queue("a")] == mine
    for act in (studio.cancel, studio.resume, studio.submit_next_seeds, lambda id, owner: studio.move(id, 1, owner)):
        with pytest.raises(Forbidden):
            act(mine[0], "b")


def test_many_threads_lose_no_job(studio):
    studio.pause()
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.extend(studio.submit(SEQUENTIAL, "a") for _ in range(20))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 100
    assert {one.id for one in studio.queue()} == set(ids)
    assert studio.store.count(WAITING) == 100


def test_images_are_found_kept_and_deleted(tmp_path):
    store = Store(tmp_path)
    image = Image.new("RGB", (300, 200), "red")
    requests = [Request(text) for text in ("a red apple", "a 100% red_robot", "a blue robot")]
    ids = []
    for number, request in enumerate(requests):
        ids += store.add_images(f"job{number}", 0.0, "a", [(image, request)], [((1, 2), (3, 4))], [None], [0.5])
    prompts_of = lambda **how: [saved.request.prompt for saved in store.images(**how)]  # noqa: E731
    assert set(prompts_of(search="red")) == {"a red apple", "a 100% red_robot"}
    assert prompts_of(search="robot BLUE") == ["a blue robot"]
    assert prompts_of(search="0% d_r") == ["a 100% red_robot"]
    assert prompts_of(search="%") == ["a 100% red_robot"]
    store.set_favourite(ids[0], True)
    assert prompts_of(favourites=True) == ["a red apple"]
    assert store.image(ids[0]).tokens == ((1, 2), (3, 4))
    assert store.thumbnail(ids[0]).size == (256, 171)
    with zipfile.ZipFile(store.zip_images(ids[:2])) as archive:
        assert set(archive.namelist()) == {f"{ids[0]}.png", f"{ids[1]}.png", "settings.jsonl"}
        assert json.loads(archive.read("settings.jsonl").splitlines()[0])["prompt"] == "a red apple"
    (store.private_folder / "thumbnails" / f"{ids[1]}.webp").unlink(missing_ok=True)
    store.file(ids[1]).unlink()  # by hand, behind the store's back
    assert store.thumbnail(ids[1]).getpixel((0, 0)) == MISSING
    with pytest.raises(FileNotFoundError, match="is not there any more"):
        store.read_image(ids[1])
    with zipfile.ZipFile(store.zip_images(ids[:2])) as archive:
        assert archive.read("missing.txt").decode().split() == [f"{ids[1]}.png"]
        assert f"{ids[0]}.png" in archive.namelist()
    store.delete(ids[0])
    assert not store.file(ids[0]).exists()
    assert len(store.images()) == 2
    with pytest.raises(KeyError, match="there is no image"):
        store.delete("../../etc/passwd")
    store.save_preset("a", "mine", {"top_k": 3})
    assert store.presets("a") == {"mine": {"top_k": 3}}
    assert store.presets("b") == {}
    store.close()


def test_files_can_be_without_settings(tmp_path, pipe):
    studio = Studio(tmp_path, lambda name: pipe, metadata=False)
    try:
        saved = studio.result(studio.submit(SEQUENTIAL)).images[0]
        assert not Image.open(studio.store.file(saved.id)).info
        assert saved.request.prompt == "a pizza"
    finally:
        studio.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_images": 2.5},
        {"num_images": True},
        {"temperature": float("nan")},
        {"guidance_scale": "much"},
        {"top_k": 1.5},
        {"seed": None, "num_images": 65},
        {"prompt": "x" * (MAX_PROMPT + 1)},
        {"prompt": 7},
        {"top_p": float("inf")},
    ],
)
def test_values_of_the_wrong_kind_are_refused(wrong):
    with pytest.raises(ValueError, match="expected|is empty"):
        Request(**{"prompt": "a pizza", **wrong})


def test_latents_are_kept_for_a_job_that_goes_on(tmp_path):
    from argen.hub.loading import load

    xar = load("argen/emoji-xar")
    studio = Studio(tmp_path, lambda name: xar)
    try:
        id = studio.submit(Request("a heart", "argen/emoji-xar"))
        for now in studio.watch(id):
            if now.decided >= 16:
                studio.cancel(id)
        if now.state == CANCELLED:
            studio.resume(id)
        done = studio.result(id, timeout=60)
        assert done.state == DONE
        assert done.images[0].tokens is None
        with torch.no_grad():
            *_, whole = xar.run(done.images[0].request)
        image = Image.open(studio.store.file(done.images[0].id))
        assert image.size == whole.images[0].size
    finally:
        studio.close()
