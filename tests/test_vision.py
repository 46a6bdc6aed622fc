"""Tests of push from images: pictures and films, keypoints, and learning with convolutions."""
import dataclasses

import imageio.v3 as imageio
import mujoco
import numpy as np
import pytest
import torch

import gmps
import policy
from advantages import policy_gradient_batch
from envs import BatchEnv, Environments, rollout
from evaluate import evaluate
from local_policies import Demonstrations, make_demonstrations
from policy import imitation_loss
from settings import random_streams
from tasks import make_family, task_set
from tasks.push_vision import CROP_LEFT, CROP_TOP
from tasks.rendering import NoOpenGL
from tests.conftest import (
    PUSH,
    TINY,
    explore,
    make_problem,
    push_north,
    scripted_expert,
    through_bytes,
)
from tools.pictures import draw_film

VISION = make_family("push-vision")
SMALL = dataclasses.replace(TINY, task="push-vision", demonstration_episodes=2, imitation_steps=2,
                            imitation_batch=5, collections=2, meta_steps=2,
                            aggregation_episodes=2)
TASKS = task_set(VISION, "train", 2)


@pytest.fixture
def environments():
    """Of push-vision, or a skipped test."""
    made = Environments(make_family("push-vision"), 1)
    try:
        made(1)
    except NoOpenGL as error:
        pytest.skip(str(error))
    yield made
    made.close()


def pushed(env, tasks, keep_images=True):
    """Episodes that push northwards."""
    steps = iter(push_north(num_envs=len(tasks)))
    return rollout(env, lambda observation, last: next(steps), np.array(tasks), keep_images)


# ---------------------------------------------------------------- pictures
def test_images_depend_on_neither_goal_nor_batch_and_physics_is_that_of_push(environments):
    """Beside the image there is the hand, and nothing of the block."""
    two, goals = environments(2), ([-0.1, 0.7], [0.1, 0.8], [0.0, 0.75])
    one, other = pushed(two, goals[:2]), pushed(two, goals[1:])
    alone, plain = pushed(environments(1), goals[2:]), pushed(BatchEnv(2, PUSH, 1), goals[:2])
    for key in ("images", "observations"):
        assert np.array_equal(one[key], other[key]) and np.array_equal(one[key][:1], alone[key])
    assert one["images"].shape == (2, 51, 48, 64, 3) and one["images"].dtype == np.uint8
    assert (one["images"][0, -1] != one["images"][:, [0, -1]]).any((2, 3, 4)).tolist() == [
        [True, False], [True, True]], "bodies move, and not alike in both"
    assert np.array_equal(one["rewards"], plain["rewards"])
    assert np.array_equal(one["states"], plain["observations"])
    assert np.array_equal(one["observations"], plain["observations"][..., :3])
    assert "images" not in pushed(two, goals[:2], keep_images=False)


def test_image_is_the_crop_of_the_release_s_picture(environments):
    """An 84 x 84 picture with MuJoCo's field of view, cropped. 1% of pixels may lie on an edge."""
    env = environments(1)
    image = pushed(env, [[0.0, 0.75]])["images"][0, -1]
    xml = VISION.xml()
    start = xml.index("resolution=", xml.index('<camera name="policy"'))
    model = mujoco.MjModel.from_xml_string(xml[:start] + 'fovy="45"' + xml[xml.index("/>", start):])
    quality, data = model.vis.quality, mujoco.MjData(model)
    quality.shadowsize = quality.offsamples = 0
    quality.numslices, quality.numstacks, quality.numquads = 6, 4, 1
    mujoco.mj_setState(model, data, env.state[0], mujoco.mjtState.mjSTATE_FULLPHYSICS)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, 84, 84) as renderer:
        renderer.update_scene(data, camera="policy")
        renderer.scene.flags[:] = 0
        whole = renderer.render()
    crop = whole[CROP_TOP:CROP_TOP + 48, CROP_LEFT:CROP_LEFT + 64]
    assert (np.abs(crop.astype(int) - image).max(-1) > 8).mean() < 0.01


def test_block_moves_in_the_image_and_stays_in_view(environments):
    """The only blue thing, pushed along the middle: it moves down the image, never lost."""
    episodes, rows = pushed(environments(1), [[0.0, 0.75]]), []
    for image in episodes["images"][0].astype(int):
        blue = np.argwhere(image[..., 2] > image[..., 0] + 60)
        assert len(blue) > 15
        rows.append(blue[:, 0].mean())
    assert episodes["states"][0, -1, 4] - PUSH.block_start[1] > 0.2
    assert rows[0] < 20 < 30 < rows[-1]


def test_without_opengl_one_line_says_what_to_install(monkeypatch):
    """Environments that show no picture need none."""
    def broken(*_):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")
    monkeypatch.setattr(mujoco, "GLContext", broken, raising=False)
    with pytest.raises(NoOpenGL, match="libegl1.*libosmesa6") as error:
        BatchEnv(1, VISION)
    assert "\n" not in str(error.value)
    BatchEnv(1, PUSH).close()


def test_film_shows_both_policies_side_by_side_and_says_which(tmp_path, environments):
    """The same policy twice: but for a palette's worth, the halves differ in their labels alone."""
    family = make_family("push")
    family.horizon, family.frames_every = 9, 4
    theta = policy.init_policy(family, TINY, torch.Generator().manual_seed(0))
    adapter = gmps.Adapter({"theta": theta, "alpha": {}, "scale": None}, family, TINY)
    adapter.begin(1, torch.Generator())
    draw_film(tmp_path, family, {0: adapter, 3: adapter}, task_set(family, "validation", 1))
    film = imageio.imread(tmp_path / "before_after.gif").astype(int)
    assert film.shape == (3, 240, 640, 3), "the start, and after steps 4 and 8"
    difference = abs(film[:, :, :320] - film[:, :, 320:])
    assert difference[:, :210].max() < 40 and difference[:, 220:236, :160].max() > 200
    assert abs(film[0] - film[-1]).max() > 100, "the arm moves"


# ---------------------------------------------------------------- keypoints
def test_soft_argmax_closed_forms():
    """One bright pixel, an even map (its middle), two equal pixels (the point between them)."""
    maps = torch.zeros(1, 4, 6, 8, dtype=torch.float64)
    maps[0, 0, 1, 5] = maps[0, 2, 0, 0] = maps[0, 3, 5, 0] = maps[0, 3, 5, 7] = 1000.0
    x, y = policy.soft_argmax(maps)[0].chunk(2)
    assert x.tolist() == pytest.approx([-1 + 2 * 5 / 7, 0, -1, 0], abs=1e-12)
    assert y.tolist() == pytest.approx([-1 + 2 * 1 / 5, 0, -1, 1], abs=1e-12)


def test_keypoints_are_those_of_torch_s_convolution_modules(monkeypatch):
    """16 filters, kernels 5, 3, 3 and strides 3, 3, 1. Chunks do not matter."""
    generator = torch.Generator().manual_seed(0)
    theta = policy.init_convolutions(generator, torch.float64)
    image = torch.randint(0, 256, (2, 3, 48, 64, 3), dtype=torch.uint8, generator=generator)
    layers = [torch.nn.Conv2d(3, 16, 5, 3, 2), torch.nn.Conv2d(16, 16, 3, 3, 1),
              torch.nn.Conv2d(16, 16, 3, 1, 1, bias=False)]
    for i, layer in enumerate(layers, start=1):
        layer.weight.data = theta[f"conv{i}_w"]
        if i < 3:
            layer.bias.data = theta[f"conv{i}_b"]
    x = (image.flatten(0, 1).double() / 127.5 - 1).permute(0, 3, 1, 2)
    maps = layers[2](layers[1](layers[0](x).relu()).relu())
    assert maps.shape == (6, 16, 6, 8)
    reference = policy.soft_argmax(policy.SHARPNESS * maps).view(2, 3, 32)
    for chunk in (500, 4):
        monkeypatch.setattr(policy, "CHUNK", chunk)
        assert torch.allclose(policy.keypoints(theta, image), reference, rtol=1e-10, atol=1e-12)


def random_problem(images):
    """theta in float64, normal(*shape), and so many random images for each of 2 tasks."""
    generator = torch.Generator().manual_seed(0)
    theta = policy.init_policy(VISION, SMALL, generator, torch.float64)
    image = torch.randint(0, 256, (2, images, 48, 64, 3), dtype=torch.uint8, generator=generator)
    return theta, lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64), image


def test_gradient_of_imitation_through_the_convolutions_against_finite_differences():
    """Along a random direction of each parameter. A small step: kinks of the ReLUs are near."""
    theta, normal, image = random_problem(images=1)
    hand, action = normal(2, 1, 3), normal(2, 1, 3)

    def loss(parameters):
        x = policy.features(parameters, hand, image)
        return imitation_loss(policy.per_task(parameters, 2), x, action, SMALL)

    del theta["log_std"]  # imitation is of means
    loss({name: value.requires_grad_() for name, value in theta.items()}).backward()
    for name, value in theta.items():
        direction, step = normal(*value.shape), 1e-7
        with torch.no_grad():
            ahead, back = (loss(theta | {name: value + s * step * direction}) for s in (1, -1))
        slope = float(ahead - back) / (2 * step)
        assert float((value.grad * direction).sum()) == pytest.approx(slope, rel=1e-5), name


# ---------------------------------------------------------------- learning
def test_convolutions_run_once_for_each_image_of_a_rollout_and_never_adapt(
        environments, monkeypatch):
    """Once per step, for all environments. What they gave is what the policy gradient takes."""
    (theta, _, _), seen, keypoints = random_problem(images=0), [], policy.keypoints

    def counted(params, image):
        seen.append(image)
        return keypoints(params, image)
    monkeypatch.setattr(policy, "keypoints", counted)
    problem = make_problem(TASKS, family=VISION)
    problem.rollout = environments.rollout
    phi, alpha = policy.per_task(theta, 2), gmps.init_step_sizes(theta, SMALL)
    episodes, explored = explore(phi, problem, SMALL, 2, torch.Generator().manual_seed(0))
    batch, _ = policy_gradient_batch(explored, SMALL)
    phi = gmps.adapt(theta, alpha, batch, SMALL, first_order=True)
    assert len(seen) == VISION.horizon and {image.shape for image in seen} == {(2, 2, 48, 64, 3)}
    hand = episodes["observations"][:, :-1].reshape(2, 2, 50, 3)
    x = torch.cat([keypoints(theta, torch.stack(seen, 2)),
                   policy.normalised(VISION, hand, torch.float64)], dim=-1)
    assert torch.allclose(batch["features"], x.flatten(1, 2), rtol=1e-12, atol=1e-12)
    convolutions = {"conv1_w", "conv1_b", "conv2_w", "conv2_b", "conv3_w"}
    assert set(theta) - set(alpha) == convolutions and set(phi) == set(theta)
    for name, value in theta.items():
        if name in convolutions:
            assert torch.equal(phi[name], value)
        else:
            assert phi[name].shape == (2, *value.shape)
            assert torch.equal(phi[name][0], phi[name][1]) == (name == "log_std")


def test_demonstrations_show_images_and_are_labelled_from_the_state(environments):
    """Frozen, they give the features of those same images."""
    env, settings = environments(2), dataclasses.replace(SMALL, demonstration_episodes=1)
    demonstrations, episodes = make_demonstrations(env, scripted_expert, TASKS, settings)
    observations, actions, _, images, states = demonstrations.arrays().values()
    assert observations.shape == actions.shape == (2, 50, 3)
    assert episodes["images"].shape[:2] == (2, 51)

    def expert(observation, last):
        return scripted_expert(env.expert_observation[:, None], TASKS)[:, 0]
    replayed = rollout(env, expert, TASKS, keep_images=True)
    assert np.array_equal(replayed["images"][:, :-1], images)
    assert np.array_equal(replayed["states"][:, :-1], states)
    assert np.array_equal(replayed["actions"], actions)
    assert np.array_equal(replayed["observations"][:, :-1], observations)

    def sample():
        return demonstrations.sample(VISION, np.random.default_rng(0), np.array([1]), 7)
    observation, action, image, state = sample()
    where = [int(np.flatnonzero((actions[1] == a).all(1) & (images[1] == i).all((1, 2, 3)))[0])
             for a, i in zip(action[0].numpy(), image[0].numpy())]
    assert torch.equal(observation[0], policy.normalised(VISION, observations[1, where]))
    assert torch.equal(state[0], policy.normalised(PUSH, states[1, where]))
    theta = policy.init_policy(VISION, SMALL, torch.Generator().manual_seed(0))
    demonstrations.freeze(VISION, theta)
    x, same_action = sample()
    assert torch.allclose(x, policy.features(theta, observation, image), rtol=1e-5, atol=1e-6)
    assert torch.equal(same_action, action)
    for fault in ({"images": images[:, 1:]}, {"images": images, "states": states[:, 1:]}):
        with pytest.raises(ValueError, match=[*fault][-1]):
            Demonstrations(observations, actions, **fault)


@pytest.mark.parametrize("known", [True, False])
def test_imitation_tells_the_state_behind_the_image(known):
    """The same numbers as a torch.nn.Linear beside the policy gives; none without states."""
    rng, settings = np.random.default_rng(0), dataclasses.replace(SMALL, imitation_steps=3)
    shapes = {"observations": (3,), "actions": (3,), "images": (48, 64, 3), "states": (6,)}
    arrays = {name: rng.uniform(-1, 1, (2, 4, *shape)) for name, shape in shapes.items()}
    arrays["images"] = rng.integers(0, 256, arrays["images"].shape, dtype=np.uint8)
    if not known:
        del arrays["states"]
    demonstrations = Demonstrations(**arrays)
    found = policy.imitate(VISION, demonstrations, settings)

    draws, generator = random_streams(settings.seed, "imitation", 0)
    theta = policy.init_policy(VISION, settings, generator)
    linear = torch.nn.Linear(32 + 3, 6)
    torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    optimiser = torch.optim.Adam(
        [*(value.requires_grad_() for value in theta.values()), *linear.parameters()])
    for step in range(3):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * (1 - step / 3)
        hand, action, image, *state = demonstrations.sample(VISION, draws, np.arange(2), 5)
        x = policy.features(theta, hand, image)
        loss = imitation_loss(policy.per_task(theta, 2), x, action, settings)
        if known:
            error = torch.nn.functional.mse_loss(linear(x), state[0])
            loss = loss + policy.STATE_WEIGHT * 6 * error
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, value in theta.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


def test_meta_training_from_image_demonstrations_resumes_with_the_same_bits(environments):
    """Episodes of 10 steps. Convolutions learn from imitation alone. Experts see the state."""
    adapters, asked, environments.family.horizon = [], [], 10

    def expert(states, tasks):
        asked.append(states)
        return scripted_expert(states, tasks)

    def train(state=None):
        demonstrations, _ = make_demonstrations(environments(4), scripted_expert, TASKS, SMALL)
        problem = make_problem(TASKS, demonstrations, expert, environments.family, adapters.append)
        return [(through_bytes(s), m) for s, m in gmps.train(problem, SMALL, state)]

    through = train()
    resumed, last = train(through[0][0]), through[1][0]["policy"]
    start = policy.init_policy(VISION, SMALL, random_streams(SMALL.seed, "imitation", 0)[1])
    for name, value in last["theta"].items():
        assert torch.equal(value, resumed[0][0]["policy"]["theta"][name])
        imitated = last["no_adaptation"][name]
        assert torch.equal(value, imitated) == name.startswith(("conv", "log_std")), name
        assert torch.equal(start[name], imitated) == (name == "log_std")
    assert through[1][1] == resumed[0][1] and through[1][1]["env_steps"] == 160
    inputs, actions, mask = through[1][0]["training"]["aggregated"]
    states = np.concatenate(asked[:2], axis=1)
    assert states.shape == (2, 40, 6) and mask.all()
    assert inputs.shape == (2, 40, 32 + 3), "points in the image, and the hand"
    assert torch.equal(inputs[..., 32:], policy.normalised(VISION, states[..., :3]))
    assert np.array_equal(actions, scripted_expert(states, TASKS))
    evaluation = evaluate(environments, adapters[0], TASKS, 1, SMALL.episodes, seed=0)
    assert len(evaluation.lists["held_out"]) == 4 and len(evaluation.lists["no_adaptation"]) == 2
    assert np.isfinite([entry["return"] for entry in evaluation.lists["held_out"]]).all()
