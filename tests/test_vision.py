"""Tests of push from images: pictures, films, what a policy sees in them, and meta-gradients through the convolutions."""
import dataclasses
from types import SimpleNamespace

import gymnasium
import imageio.v3 as imageio
import mujoco
import numpy as np
import pytest
import torch

import envs
import gmps
import local_policies
import pictures
import policy
import vision
from conftest import push_north, relative_error, scripted_expert, through_bytes
from envs import BatchEnv, make_family, rollout, task_set
from settings import Settings
from vision import SawyerPushVision

VISION = SawyerPushVision()
TINY = Settings(task="push-vision", training_tasks=2, demonstration_episodes=2, episodes=2, hidden=8, bias_vector=2,
                init_step_size=0.1, imitation_steps=2, imitation_batch=5, image_batch=6, collections=2, meta_steps=2,
                inner_steps=1)


def gl_works():
    try:
        vision.Camera(VISION).close()
    except vision.NoOpenGL:
        return False
    return True


needs_gl = pytest.mark.skipif(not gl_works(), reason="no OpenGL here")


@pytest.fixture
def env():
    batch = BatchEnv(2, VISION, threads=1)
    yield batch
    batch.close()


def pushed(env, task, steps=20):
    """Observations after every step of a push northwards."""
    observations = [env.reset(options={"task": task})[0]]
    for action in push_north(steps, env.num_envs):
        observations.append(env.step(action)[0])
    return observations


# ---------------------------------------------------------------- pictures
@needs_gl
def test_images_are_the_same_for_any_goal_and_any_batch(env):
    """Nothing of the goal is in image or hand; the first environment's pictures do not depend on the others."""
    one, other = pushed(env, [-0.1, 0.7]), pushed(env, [0.1, 0.8])
    single = BatchEnv(1, VISION, threads=1)
    alone = pushed(single, [0.0, 0.75])
    single.close()
    for a, b, c in zip(one, other, alone):
        for part in ("image", "hand"):
            assert np.array_equal(a[part], b[part]) and np.array_equal(a[part][:1], c[part])
    assert not np.array_equal(one[0]["image"], one[-1]["image"])


@needs_gl
def test_observations_fit_their_spaces_and_hold_no_block_position(env):
    observation = pushed(env, [0.0, 0.75], steps=2)[-1]
    assert observation["image"].shape == (2, 48, 64, 3) and observation["image"].dtype == np.uint8
    assert observation["hand"].shape == (2, 3) and set(observation) == {"image", "hand"}
    assert env.observation_space.contains(observation)
    assert np.array_equal(observation["hand"], env.expert_observation[:, :3])
    single = gymnasium.make(VISION.env_id)
    first, _ = single.reset(seed=0)
    after = single.step(single.action_space.sample())[0]
    assert single.observation_space.contains(first) and single.observation_space.contains(after)
    single.close()


@needs_gl
def test_image_is_the_crop_of_the_release_s_picture():
    """An 84 x 84 picture with MuJoCo's field of view, by mujoco.Renderer, cropped: the same pixels."""
    batch = BatchEnv(1, VISION, threads=1)
    image = pushed(batch, [0.0, 0.75])[-1]["image"][0]
    xml = VISION.xml()
    start = xml.index("resolution=", xml.index('<camera name="policy"'))
    model = mujoco.MjModel.from_xml_string(xml[:start] + 'fovy="45"' + xml[xml.index("/>", start):])
    quality = model.vis.quality
    quality.shadowsize = quality.offsamples = 0
    quality.numslices, quality.numstacks, quality.numquads = 6, 4, 1
    data = mujoco.MjData(model)
    mujoco.mj_setState(model, data, batch.state[0], mujoco.mjtState.mjSTATE_FULLPHYSICS)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, 84, 84) as renderer:
        renderer.update_scene(data, camera="policy")
        renderer.scene.flags[:] = 0
        whole = renderer.render()
    batch.close()
    crop = whole[vision.CROP_TOP:vision.CROP_TOP + 48, vision.CROP_LEFT:vision.CROP_LEFT + 64]
    assert (np.abs(crop.astype(int) - image).max(-1) > 8).mean() < 0.01  # an edge may fall on the other side of a pixel


@needs_gl
def test_block_moves_in_the_image_and_stays_in_view():
    """The block is the only blue thing. Pushed 30 cm along the middle, its pixels move down the image and are never lost."""
    batch = BatchEnv(1, VISION, threads=1)
    rows = []
    for observation in pushed(batch, [0.0, 0.75], steps=45):
        image = observation["image"][0].astype(int)
        blue = np.argwhere(image[..., 2] > image[..., 0] + 60)
        assert len(blue) > 15
        rows.append(blue[:, 0].mean())
    moved = batch.expert_observation[0, 4] - VISION.block_start[1]
    batch.close()
    assert moved > 0.2 and rows[0] < 15 < 25 < rows[-1]


@needs_gl
def test_physics_and_rewards_are_those_of_push():
    tasks, actions = np.array([[-0.05, 0.72], [0.08, 0.78]]), push_north(num_envs=2)
    rolled = []
    for family in (VISION, envs.SawyerPush()):
        batch, step = BatchEnv(2, family, threads=1), iter(actions)
        rolled.append(rollout(batch, lambda _, step=step: next(step), tasks))
        batch.close()
    seen, state = rolled
    assert np.array_equal(seen["rewards"], state["rewards"]) and np.array_equal(seen["states"], state["observations"])
    assert seen["images"].shape == (2, 51, 48, 64, 3) and seen["images"].dtype == np.uint8


def test_without_opengl_one_line_says_what_to_install(monkeypatch):
    def broken(*_):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")
    monkeypatch.setattr(mujoco, "GLContext", broken, raising=False)
    with pytest.raises(RuntimeError, match="libegl1.*libosmesa6") as error:
        BatchEnv(1, VISION)
    assert "\n" not in str(error.value)
    BatchEnv(1, "push").close()  # needs none


@needs_gl
def test_film_shows_both_policies_side_by_side_and_says_which(tmp_path):
    """The same policy twice: the halves differ in their labels alone. A frame for the start, and for every so many steps."""
    family, settings = make_family("push"), Settings(hidden=8)
    phi = policy.per_task(policy.init_policy(family, settings, torch.Generator().manual_seed(0)), 1)
    run = SimpleNamespace(family=family, out=tmp_path)
    pictures.draw_video(run, [phi, None, None, phi], task_set(family, "validation", 1)[0])
    film = imageio.imread(tmp_path / "before_after.gif")
    assert film.shape == (1 + family.horizon // family.frames_every, 240, 640, 3)
    before, after = film[0, :, :320].astype(int), film[0, :, 320:].astype(int)
    assert abs(before[:210] - after[:210]).max() < 40, "a palette's worth of difference"
    assert abs(before[220:236, :160] - after[220:236, :160]).max() > 200
    assert abs(film[0].astype(int) - film[-1]).max() > 100, "the arm moves"


# ---------------------------------------------------------------- what a policy sees
def test_soft_argmax_closed_forms():
    """One bright pixel gives its coordinates, an even map the middle, two equal pixels the point between them."""
    maps = torch.zeros(1, 4, 6, 8, dtype=torch.float64)
    maps[0, 0, 1, 5] = maps[0, 2, 0, 0] = maps[0, 3, 5, 0] = maps[0, 3, 5, 7] = 1000.0
    x, y = vision.soft_argmax(maps)[0].chunk(2)
    assert x.tolist() == pytest.approx([-1 + 2 * 5 / 7, 0, -1, 0], abs=1e-12)
    assert y.tolist() == pytest.approx([-1 + 2 * 1 / 5, 0, -1, 1], abs=1e-12)


def test_keypoints_are_those_of_torch_s_convolution_modules(monkeypatch):
    """16 filters, kernels 5, 3, 3 and strides 3, 3, 1; chunks do not matter."""
    theta = vision.init_convolutions(torch.Generator().manual_seed(0), torch.float64)
    image = torch.randint(0, 256, (2, 3, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    layers = [torch.nn.Conv2d(3, 16, 5, 3, 2), torch.nn.Conv2d(16, 16, 3, 3, 1),
              torch.nn.Conv2d(16, 16, 3, 1, 1, bias=False)]
    for i, layer in enumerate(layers, start=1):
        layer.weight.data = theta[f"conv{i}_w"]
        if i < 3:
            layer.bias.data = theta[f"conv{i}_b"]
    x = (image.flatten(0, 1).double() / 127.5 - 1).permute(0, 3, 1, 2)
    maps = layers[2](layers[1](layers[0](x).relu()).relu())
    assert maps.shape == (6, 16, 6, 8)
    reference = vision.soft_argmax(vision.SHARPNESS * maps).view(2, 3, 32)
    for chunk in (500, 4):
        monkeypatch.setattr(vision, "CHUNK", chunk)
        assert torch.allclose(vision.keypoints(theta, image), reference, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- the meta-learner
def meta_problem(n=2, size=6):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def images(count):
        return torch.randint(0, 256, (n, count, 48, 64, 3), dtype=torch.uint8, generator=generator)

    theta = policy.init_policy(VISION, TINY, generator, torch.float64)
    alpha = {name: value + 0.3 for name, value in gmps.init_step_sizes(theta, TINY).items()}
    batch = {"observation": normal(n, size, 3), "image": images(size), "action": normal(n, size, 3),
             "advantage": normal(n, size), "mask": torch.ones(n, size, dtype=torch.float64)}
    return theta, alpha, batch, (normal(n, 5, 3), normal(n, 5, 3), images(5))


def test_meta_gradient_through_the_convolutions_against_finite_differences():
    """Along a random direction of every parameter: the gradient has a part through the inner step and one through imitation.

    The behaviour policy moves along with theta, so that the importance weights are 1 throughout, as they are held fixed.
    """
    theta, alpha, batch, demonstration = meta_problem()

    def loss(parameters):
        behaviour = policy.log_prob(policy.per_task(parameters, 2), policy.seen(parameters, batch)["observation"],
                                  batch["action"], TINY).detach()
        return gmps.meta_loss(parameters, alpha, [batch | {"log_prob": behaviour}], demonstration, TINY)[0]

    for value in theta.values():
        value.requires_grad_()
    loss(theta).backward()
    assert [name for name in theta if policy.shared(name)] == ["conv1_w", "conv1_b", "conv2_w", "conv2_b", "conv3_w"]
    generator = torch.Generator().manual_seed(1)
    for name, value in theta.items():
        # a smaller step than elsewhere: among 100,000 rectified units some are always near their kink
        direction, step = torch.randn(value.shape, generator=generator, dtype=torch.float64), 1e-7
        moved = [(value.detach() + sign * step * direction).requires_grad_() for sign in (1, -1)]
        slope = (loss(theta | {name: moved[0]}) - loss(theta | {name: moved[1]})).detach() / (2 * step)
        assert relative_error((value.grad * direction).sum(), slope) < 1e-5, name


def test_inner_step_leaves_the_convolutions_alone():
    theta, alpha, batch, _ = meta_problem()
    batch["log_prob"] = torch.zeros(2, 6, dtype=torch.float64)
    phi = gmps.adapted(theta, alpha, [batch], TINY, 2)
    assert set(alpha) == {name for name in theta if not name.startswith("conv")} and set(phi) == set(theta)
    for name, value in phi.items():
        if name.startswith("conv"):
            assert torch.equal(value, theta[name])
        else:
            assert value.shape == (2, *theta[name].shape) and not torch.equal(value[0], value[1])
    assert torch.equal(policy.one_task(phi, 1)["w1"][0], phi["w1"][1])


def test_some_images_keeps_samples_together():
    _, _, batch, _ = meta_problem()
    some = gmps.some_images(batch, np.random.default_rng(0), 4)
    assert {len(value[0]) for value in some.values()} == {4}
    where = [int((batch["action"][0] == action).all(-1).nonzero()) for action in some["action"][0]]
    for name, value in some.items():
        assert torch.equal(value, batch[name][:, where])
    assert gmps.some_images({"action": batch["action"]}, None, 4)["action"] is batch["action"]


@needs_gl
def test_demonstrations_show_images_and_are_labelled_from_the_state(env):
    tasks, settings = task_set(VISION, "train", 2), dataclasses.replace(TINY, demonstration_episodes=1)
    observations, actions, images, env_steps = local_policies.make_demonstrations(env, scripted_expert, tasks, settings)
    assert observations.shape == actions.shape == (2, 50, 3) and images.shape == (2, 50, 48, 64, 3) and env_steps == 100
    replayed = rollout(env, lambda _: scripted_expert(env.expert_observation[:, None], tasks)[:, 0], tasks)
    assert np.array_equal(replayed["images"][:, :-1], images) and np.array_equal(replayed["actions"], actions)
    demonstrations = gmps.Demonstrations(observations, actions, images)
    observation, action, image = demonstrations.sample(VISION, np.random.default_rng(0), np.array([1]), 7)
    where = [int(np.flatnonzero((actions[1] == a).all(1) & (images[1] == i).all((1, 2, 3)))[0])
             for a, i in zip(action[0].numpy(), image[0].numpy())]
    assert np.allclose(observation[0].numpy(), policy.scaled(VISION, observations[1, where]).numpy())
    assert image.dtype == torch.uint8
    with pytest.raises(ValueError, match="images"):
        gmps.Demonstrations(observations, actions, images[:, 1:])


@needs_gl
@pytest.mark.parametrize("image_batch", [6, 0])
def test_meta_training_from_image_demonstrations_resumes_with_the_same_bits(image_batch):
    """Imitation, two collections and an evaluation, without experts; after a checkpoint the same bits. Convolutions learn
    with image_batch > 0 only."""
    settings = dataclasses.replace(TINY, image_batch=image_batch)
    tasks = task_set(VISION, "train", 2)
    demonstration_env, env = BatchEnv(4, VISION, threads=1), BatchEnv(4, VISION, threads=1)
    *arrays, _ = local_policies.make_demonstrations(demonstration_env, scripted_expert, tasks, TINY)
    theta = gmps.imitate(VISION, gmps.Demonstrations(*arrays), TINY)

    def train(state=None):
        return [(through_bytes(s), m) for s, m in
                gmps.meta_train(env, tasks, gmps.Demonstrations(*arrays), None, theta, settings, state)]

    through = train()
    resumed = train(through[0][0])
    for name, value in through[1][0]["theta"].items():
        assert torch.equal(value, resumed[0][0]["theta"][name])
        learns = image_batch > 0 or not policy.shared(name)
        assert torch.equal(value, theta[name]) != learns, name
    assert through[1][1] == resumed[0][1] and through[1][1]["env_steps"] == 400
    if image_batch > 0:
        return
    state = through[1][0]
    result = gmps.evaluate(VISION, state["theta"], state["alpha"], state["scales"], tasks, 1, settings, 0, 1)
    assert result["mean"]["distance"].shape == (2, 2) and np.isfinite(result["mean"]["return"]).all()
    demonstration_env.close()
    env.close()
