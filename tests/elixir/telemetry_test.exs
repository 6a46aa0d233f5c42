defmodule StarweaveImage.TelemetryTest do
  use ExUnit.Case, async: false

  setup do
    :telemetry.listen()
    start_supervised!({StarweaveImage, name: __MODULE__})
    :ok
  end

  test "a request is followed from start to stop" do
    opts = [instance: __MODULE__, width: 64, height: 64, steps: 2, id: "followed", user_id: "u"]
    {:ok, image} = StarweaveImage.generate("a red apple", opts)

    assert_receive {:telemetry, [:starweave, :image, :sidecar, :start], %{system_time: _},
                    %{instance: __MODULE__, generation: 1, os_pid: os_pid}}

    assert_receive {:telemetry, [:starweave, :image, :sidecar, :ready], %{duration: _},
                    %{instance: __MODULE__, os_pid: ^os_pid, device: _, dtype: _}}

    assert_received {:telemetry, [:starweave, :image, :request, :start], %{system_time: _},
                     %{instance: __MODULE__, id: "followed", user_id: "u", priority: :normal}}

    assert_received {:telemetry, [:starweave, :image, :request, :progress], %{step: 2, steps: 2},
                     %{id: "followed", phase: :denoising, image: 0}}

    bytes = byte_size(image.data)

    assert_received {:telemetry, [:starweave, :image, :request, :stop],
                     %{duration: duration, queue_duration: waited, bytes: ^bytes, images: 1},
                     %{id: "followed", model: "starweave/tiny", result: :ok, attempts: 1}}

    assert duration >= waited
  end

  test "a failed request says its kind" do
    {:error, _} =
      StarweaveImage.generate("a red apple", instance: __MODULE__, id: "slow", timeout: 1)

    assert_received {:telemetry, [:starweave, :image, :request, :stop], %{images: 0},
                     %{id: "slow", model: "starweave/tiny", result: :timeout}}
  end
end
