defmodule StarweaveImage.BadModelsTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.Error

  @moduletag :slow
  @moduletag :tmp_dir
  @moduletag timeout: 300_000

  @tiny Path.expand("priv/models/starweave-tiny")
  @small [steps: 1, width: 64, height: 64, timeout: 240_000]

  # Two ways in which a model cannot be one, and weights that are not those that the configuration pins.
  defp models(tmp_dir) do
    deep = copy(tmp_dir, "deep")
    File.write!(Path.join(deep, "unet/config.json"), String.duplicate("[", 200_000))
    gone = copy(tmp_dir, "gone")
    weights = Path.join(gone, "vae/diffusion_pytorch_model.safetensors")
    File.rm!(weights)
    File.ln_s!("/gone", weights)
    pins = %{"unet/diffusion_pytorch_model.safetensors" => String.duplicate("0", 64)}

    [
      {"my/deep", path: deep},
      {"my/gone", path: gone},
      {"my/pinned", path: copy(tmp_dir, "pinned"), sha256: pins, fallbacks: ["starweave/tiny"]}
    ]
  end

  defp copy(tmp_dir, name) do
    folder = Path.join(tmp_dir, name)
    File.cp_r!(@tiny, folder)
    folder
  end

  test "are told with their reasons, and the others are served", %{tmp_dir: tmp_dir} do
    start_supervised!({StarweaveImage, name: __MODULE__, models: models(tmp_dir)})
    here = [instance: __MODULE__]
    assert {:ok, image} = StarweaveImage.generate("a red apple", here ++ @small)
    assert image.model == "starweave/tiny"

    cards = Map.new(StarweaveImage.models(instance: __MODULE__), &{&1.id, &1})
    assert %{state: :failed, tasks: [], error: deep} = cards["my/deep"]
    assert deep == "my/deep cannot be loaded: its unet/config.json is nested too deeply"
    assert %{state: :failed, error: "my/gone is incomplete: its vae" <> _} = cards["my/gone"]

    assert {:error, %Error{kind: :model_load_failed, message: ^deep}} =
             StarweaveImage.generate("a red apple", here ++ @small ++ [model: "my/deep"])

    pinned = here ++ @small ++ [model: "my/pinned"]
    assert {:error, error} = StarweaveImage.generate("a red apple", pinned)
    assert error.kind == :model_load_failed

    assert error.message =~
             "its unet/diffusion_pytorch_model.safetensors is not the file that the configuration pins"

    assert {:ok, image} = StarweaveImage.generate("a red apple", pinned ++ [fallback: true])
    assert image.model == "starweave/tiny"
    assert Enum.any?(image.notices, &(&1 =~ "my/pinned"))
  end
end
