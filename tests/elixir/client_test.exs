defmodule StarweaveImage.ClientTest.Host do
  # A module of the host that has the functions of its own client.
  use StarweaveImage.Client
end

defmodule StarweaveImage.ClientTest do
  # The client has one name, and so has the instance that it uses.
  use ExUnit.Case, async: false

  alias StarweaveImage.Client
  alias StarweaveImage.ClientTest.Host
  alias StarweaveImage.{TestInstance, TestOSProcess}

  @moduletag timeout: 300_000

  doctest StarweaveImage.Client

  @unavailable {:error, "Image generation service is not available"}
  @disabled {:error, "Image generation is disabled"}
  defp milliseconds(fun) do
    {microseconds, result} = :timer.tc(fun)
    {div(microseconds, 1_000), result}
  end

  describe "without a working sidecar" do
    test "nothing runs: not available" do
      refute Client.available?()
      assert Client.generate_image("a red apple") == @unavailable
      assert Client.list_models() == @unavailable
    end

    test "disabled: says so and starts no instance" do
      start_supervised!({Client, host: "localhost", port: 50_051, enabled: false})
      refute Client.available?()
      assert Client.generate_image("a red apple") == @disabled
      assert Client.list_models() == {:ok, []}
      assert Process.whereis(StarweaveImage) == nil
    end

    test "a disabled instance is a disabled client" do
      start_supervised!({StarweaveImage, enabled: false})
      start_supervised!({Client, enabled: true})
      refute Client.available?()
      assert Client.generate_image("a red apple") == @disabled
      assert Client.list_models() == {:ok, []}
    end

    test "Python that cannot be started: not available, promptly" do
      start_supervised!({Client, python: "/no/such/python"})
      {took, available} = milliseconds(&Client.available?/0)
      assert {available, Client.generate_image("a red apple")} == {false, @unavailable}
      assert Client.list_models() == @unavailable
      assert took < 5_000
    end

    test "Python that ends as it starts: not available, promptly" do
      start_supervised!({Client, python: "/bin/false"})
      {took, available} = milliseconds(&Client.available?/0)
      assert {available, Client.generate_image("a red apple")} == {false, @unavailable}
      assert took < 5_000
    end

    test "under the host's own name: its module answers, and no other does" do
      refute Host.available?()
      assert Host.generate_image("a red apple") == @unavailable
      start_supervised!({Host, host: "localhost", port: 50_051, enabled: false})
      assert Process.whereis(Host)
      assert Process.whereis(Client) == nil
      assert Host.generate_image("a red apple") == @disabled
      assert Host.generate_image("a red apple", %{"width" => 64}) == @disabled
      assert Host.list_models() == {:ok, []}
      refute Host.available?()
      refute Host.available?(wait: false)
      assert Client.generate_image("a red apple") == @unavailable
    end

    test "with wait: false nothing is waited for, while Python starts and when it cannot" do
      instance = TestInstance.start("never_ready")
      client = start_client(instance)
      refute Client.available?(client: client, wait: false)
      assert Client.list_models(client: client, wait: false) == @unavailable

      ready = TestInstance.start_ready("honest")
      client = start_client(ready)
      assert Client.available?(client: client, wait: false)
      # The queue and the client are asked nothing.
      for name <- [client, ready], do: :sys.suspend(name)
      assert Client.available?(client: client, wait: false)
      for name <- [client, ready], do: :sys.resume(name)

      [%{os_pid: os_pid}] = StarweaveImage.status(instance: ready).sidecars
      TestOSProcess.signal(os_pid, "KILL")
      assert TestOSProcess.await(fn -> not Client.available?(client: client, wait: false) end)
      assert TestOSProcess.await(fn -> Client.available?(client: client, wait: false) end)
    end

    test "wrong options are raised where they are written" do
      for {opts, sentence} <- [
            {[name: "client"], ~s(name must be an atom, got "client")},
            {[enabled: "true"], ~s(enabled must be true or false, got "true")},
            {[instance: 1], "instance must be an atom, got 1"},
            {[sidecars: 0], "sidecars must be an integer from 1 to 16"},
            {[enable: true], "unknown option :enable, did you mean :enabled?"},
            {:disabled, "the options of a client must be a keyword list"},
            {%{enabled: false}, "the options of a client must be a keyword list"}
          ],
          start <- [&Client.start_link/1, &Host.start_link/1],
          not (start == (&Host.start_link/1) and opts == [name: "client"]) do
        error = assert_raise ArgumentError, fn -> start.(opts) end
        assert error.message =~ sentence
      end

      for ask <- [&Client.available?/1, &Client.list_models/1] do
        assert_raise ArgumentError, ~r/wait must be true or false/, fn -> ask.(wait: "no") end
        assert_raise ArgumentError, ~r/client must be an atom/, fn -> ask.(client: 1) end
      end
    end

    for {prompt, opts, sentence} <- [
          {"", [], "prompt must be 1 to 8192 bytes of text"},
          {"   ", [], "prompt must be 1 to 8192 bytes of text"},
          {"a\0b", [], "prompt must be 1 to 8192 bytes of text"},
          {String.duplicate("a", 10_000), [], "prompt must be 1 to 8192 bytes of text"},
          {:apple, [], "prompt must be 1 to 8192 bytes of text"},
          {"x", [width: 250], "width must be a multiple of 8 from 64 to 4096, got 250"},
          {"x", [height: 0], "height must be a multiple of 8 from 64 to 4096, got 0"},
          {"x", [steps: 0], "steps must be an integer from 1 to 200, got 0"},
          {"x", [guidance_scale: -1], "guidance_scale must be a number from 0 to 50, got -1"},
          {"x", [seed: -2], "seed must be an integer from -1 to 2^63 - 1, got -2"},
          {"x", [sed: 1], "unknown option :sed, did you mean :seed?"},
          {"x", [:width], "options must be a keyword list or a map"},
          {"x", %{"width" => 250}, "width must be a multiple of 8 from 64 to 4096, got 250"},
          {"x", [{"steps", 0}], "steps must be an integer from 1 to 200, got 0"},
          {"x", %{"width" => "512"},
           ~s(width must be a multiple of 8 from 64 to 4096, got "512")},
          {"x", %{"wdth" => 512}, ~s(unknown option "wdth", did you mean :width?)},
          {"x", %{"host" => "localhost"}, ~s(unknown option "host")},
          {"x", %{"timeout" => "5", "model" => "runwayml/stable-diffusion-v1-5"},
           ~s(timeout must be an integer from 1 to 86400000, got "5")}
        ] do
      test "#{inspect(opts)} with #{String.slice(inspect(prompt), 0, 10)} is refused with the reason" do
        opts = unquote(Macro.escape(opts))
        assert {:error, message} = Client.generate_image(unquote(prompt), opts)
        assert message =~ unquote(sentence)
      end
    end
  end

  defp start_client(instance) do
    name = Module.concat(instance, "Client")
    start_supervised!({Client, name: name, instance: instance}, id: name)
    name
  end

  test "it uses the instance that runs, and leaves it running" do
    start_supervised!({StarweaveImage, python: "/no/such/python"})
    instance = Process.whereis(StarweaveImage)
    start_supervised!(Client)
    assert Process.whereis(StarweaveImage) == instance
    :ok = stop_supervised(Client)
    assert Process.whereis(StarweaveImage) == instance
  end

  test "it starts an instance where none runs, and ends it, Python first" do
    start_supervised!(Client)
    assert Client.available?()
    %{sidecars: [%{os_pid: os_pid}]} = StarweaveImage.status()
    assert File.exists?("/proc/#{os_pid}")
    :ok = stop_supervised(Client)
    refute File.exists?("/proc/#{os_pid}")
    assert Process.whereis(StarweaveImage) == nil
  end
end

defmodule StarweaveImage.ClientWithSidecarTest do
  # One real sidecar with the embedded model for all tests, started as the host's own script does it.
  use ExUnit.Case, async: false

  alias StarweaveImage.Client

  @moduletag timeout: 300_000

  @small [width: 64, height: 64, steps: 2]

  setup_all do
    start_supervised!({Client, host: "localhost", port: 50_051, enabled: true})
    # Asked at once, as the script asks: it waits for the start.
    assert Client.available?()
    :ok
  end

  defp png_size(data) do
    <<0x89, "PNG\r\n", 0x1A, "\n", _::32, "IHDR", width::32, height::32, _::binary>> = data
    {width, height}
  end

  test "the request of the host's script" do
    opts = [
      width: 512,
      height: 512,
      steps: 10,
      guidance_scale: 7.5,
      model: "runwayml/stable-diffusion-v1-5"
    ]

    assert {:ok, data, metadata} =
             Client.generate_image("A beautiful sunset over a mountain lake, digital art", opts)

    assert png_size(data) == {512, 512}

    assert metadata |> Map.keys() |> Enum.sort() ==
             [:debug_info, :generated_at, :generation_time_ms, :model, :seed]

    assert metadata.model == "starweave/tiny"
    assert metadata.generation_time_ms > 0
    assert %DateTime{} = metadata.generated_at
    assert Enum.all?(metadata.debug_info, fn {k, v} -> is_binary(k) and is_binary(v) end)
    assert %{"steps" => "10", "guidance_scale" => "7.5"} = metadata.debug_info
    assert metadata.debug_info["requested_model"] == "runwayml/stable-diffusion-v1-5"
    assert metadata.debug_info["notice"] =~ "starweave/tiny took its place"
    refute_received _
  end

  test "the other model that its server offered has a substitute too, and no request fails for it" do
    opts = [model: "stabilityai/stable-diffusion-2-1", id: "substituted"] ++ @small

    log =
      ExUnit.CaptureLog.capture_log(fn ->
        assert {:ok, _, metadata} = Client.generate_image("a red apple", opts)
        assert metadata.model == "starweave/tiny"
        assert metadata.debug_info["requested_model"] == "stabilityai/stable-diffusion-2-1"
        assert metadata.debug_info["request_id"] == "substituted"
      end)

    assert log =~ "image request substituted done"
    refute log =~ "image request substituted failed"
  end

  test "options by their names as strings, in a map or in pairs" do
    opts = %{"width" => 72, "height" => 64, "steps" => 2, "seed" => 7, "style" => ""}
    assert {:ok, data, %{seed: 7}} = Client.generate_image("a red apple", opts)
    assert png_size(data) == {72, 64}
    assert {:ok, ^data, _} = Client.generate_image("a red apple", Map.to_list(opts))
    by_atoms = [width: 72, height: 64, steps: 2, seed: 7]
    assert {:ok, ^data, _} = Client.generate_image("a red apple", by_atoms)
  end

  test "no settings, or empty ones: 512x512, 20 steps, guidance 7.5" do
    assert {:ok, data, metadata} =
             Client.generate_image("a red apple", style: "", user_id: "", context: [], seed: nil)

    assert png_size(data) == {512, 512}
    assert %{"steps" => "20", "guidance_scale" => "7.5"} = metadata.debug_info
    assert metadata.model == "starweave/tiny"
  end

  test "an effort in place of the 20 steps" do
    opts = Keyword.delete(@small, :steps) ++ [effort: :draft]
    assert {:ok, _data, metadata} = Client.generate_image("a red apple", opts)
    assert {:ok, models} = Client.list_models()
    %{parameters: parameters} = Enum.find(models, &(&1.id == "starweave/tiny"))
    half = parameters["default_steps"] |> String.to_integer() |> Kernel./(2) |> ceil()
    assert metadata.debug_info["steps"] == Integer.to_string(half)
  end

  test "another model that is not here is an error" do
    opts = [model: "no-such/model"] ++ @small
    assert {:error, "model no-such/model is not known" <> _} = Client.generate_image("x", opts)
  end

  test "seeds: the same gives the same bytes, none or -1 a fresh one, any up to 2^63 - 1 is taken" do
    seeded = fn seed -> Client.generate_image("a red apple", [seed: seed] ++ @small) end

    for seed <- [0, 7, 2 ** 31, 2 ** 63 - 1] do
      assert {:ok, data, %{seed: ^seed}} = seeded.(seed)
      assert {:ok, ^data, _} = seeded.(seed)
    end

    seeds =
      1..24
      |> Task.async_stream(fn n -> seeded.(if rem(n, 2) == 0, do: -1) end, timeout: 120_000)
      |> Enum.map(fn {:ok, {:ok, _data, metadata}} -> metadata.seed end)

    assert length(Enum.uniq(seeds)) == 24
    # As many as its callers' int32 holds.
    assert Enum.all?(seeds, &(&1 in 0..(2 ** 31 - 1)))

    # With an id the same request may be asked for again, so it is one request with one seed.
    again = [id: "again"] ++ @small
    assert {:ok, _, %{seed: seed}} = Client.generate_image("a red apple", again)
    assert seed in 0..(2 ** 53 - 1)
  end

  test "while an image is made: others are not held up, available?/0 and list_models/0 answer within 1 s" do
    long = running("long", 16)

    {took, available} = milliseconds(&Client.available?/0)
    assert {available, took < 1_000} == {true, true}
    {took, {:ok, models}} = milliseconds(&Client.list_models/0)
    assert took < 1_000

    assert %{id: "starweave/tiny", available: true} = tiny = hd(models)

    assert {tiny.name, tiny.capabilities} ==
             {"Starweave Tiny", ["text_to_image", "image_to_image", "inpaint"]}

    assert is_binary(tiny.description)
    assert Enum.all?(tiny.parameters, fn {k, v} -> is_binary(k) and is_binary(v) end)
    assert %{available: false} = Enum.find(models, &(&1.name == "Stable Diffusion 1.5"))

    assert {:ok, _, _} = Client.generate_image("a red apple", @small)
    assert Task.yield(long, 0) == nil
    # Nobody waits for it any more, so nobody works on it.
    Task.shutdown(long, :brutal_kill)
  end

  test "eight callers at once get each their own image" do
    calls =
      for n <- 1..8 do
        opts = [width: 64 + 8 * n, height: 64, steps: 3, seed: n]
        {n, Task.async(fn -> Client.generate_image("a red apple", opts) end)}
      end

    for {n, call} <- calls do
      assert {:ok, data, %{seed: ^n}} = Task.await(call, 120_000)
      assert png_size(data) == {64 + 8 * n, 64}
    end
  end

  test "a time-out is an error that says so, and the work is over" do
    opts = [width: 64, height: 64, steps: 100, num_images: 16, timeout: 200]

    assert Client.generate_image("x", opts) == {:error, "Image generation timed out"}
    refute_received _
    assert {:ok, _, _} = Client.generate_image("a red apple", @small)
  end

  test "Python killed in the middle: the image comes all the same" do
    long = running("killed", 1)
    %{sidecars: [%{os_pid: os_pid}]} = StarweaveImage.status()
    {_, 0} = System.cmd("sh", ["-c", "kill -KILL #{os_pid}"])
    assert {:ok, _, %{debug_info: %{"attempts" => "2"}}} = Task.await(long, 240_000)
    assert Client.available?()
  end

  # A request in its steps, and the process that waits for it.
  defp running(id, num_images) do
    opts = [
      width: 64,
      height: 64,
      steps: 100,
      num_images: num_images,
      model: "starweave/tiny",
      id: id
    ]

    task = Task.async(fn -> Client.generate_image("a cat", opts) end)
    subscribe(id, System.monotonic_time(:millisecond) + 60_000)
    assert_receive {:starweave_image, ^id, {:progress, %{phase: :denoising}}}, 120_000
    task
  end

  defp subscribe(id, deadline) do
    with {:error, :not_found} <- StarweaveImage.subscribe(id) do
      assert System.monotonic_time(:millisecond) < deadline
      subscribe(id, deadline)
    end
  end

  defp milliseconds(fun) do
    {microseconds, result} = :timer.tc(fun)
    {div(microseconds, 1_000), result}
  end
end
