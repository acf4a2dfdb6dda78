import torch

from diffalign.ops import matching


def test_forward_process_ends_in_data_and_noise_and_moves_at_the_velocity():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(3, 2, 4, generator=generator), torch.randn(3, 2, 4, generator=generator)
    torch.testing.assert_close(matching.noised(x0, noise, torch.zeros(3)), x0)
    torch.testing.assert_close(matching.noised(x0, noise, torch.ones(3)), noise)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x0, noise, h = x0.double(), noise.double(), 1e-6
    slope = (matching.noised(x0, noise, t + h) - matching.noised(x0, noise, t - h)) / (2 * h)
    torch.testing.assert_close(slope, matching.velocity(x0, noise), atol=1e-8, rtol=0)
