defmodule StarweaveImage.StarweaveTest do
  # What STARWEAVE asks of its image generation, in a tree like its own: the client and an instance under one one_for_one
  # supervisor, between services that have nothing to do with them, and before what the web application starts. One
  # real sidecar with the embedded model; fakes where a test is about one that cannot work or may not end.
  use ExUnit.Case, async: false

  alias StarweaveImage.{TestInstance, TestOSProcess}

  @moduletag timeout: 300_000

  defmodule Client do
    use StarweaveImage.Client
  end

  @small [width: 64, height: 64, steps: 1]
  @unavailable {:error, "Image generation service is not available"}

  setup_all do
    start_supervised!(
      tree([StarweaveImage, {Client, host: "localhost", port: 50_051, enabled: true}])
    )

    assert Client.available?()
    :ok
  end

  # What one test has cancelled keeps its slot until Python has confirmed it.
  setup do
    assert TestOSProcess.await(fn -> StarweaveImage.status().queue.running == 0 end)
    :ok
  end

  defp tree(images, name \\ __MODULE__) do
    web = {Registry, keys: :duplicate, name: Module.concat(name, "PubSub")}
    children = [%{id: :memory, start: {Agent, :start_link, [fn -> %{} end]}}] ++ images ++ [web]
    options = [strategy: :one_for_one, name: Module.concat(name, "Supervisor")]
    %{id: name, type: :supervisor, start: {Supervisor, :start_link, [children, options]}}
  end

  defp png_size(data) do
    <<0x89, "PNG\r\n", 0x1A, "\n", _::32, "IHDR", width::32, height::32, _::binary>> = data
    {width, height}
  end

  # A request with work for minutes, its process, and the end of the wait for its first step.
  defp long(id) do
    opts = [id: id, width: 64, height: 64, steps: 100, num_images: 16]

    {pid, monitor} =
      spawn_monitor(fn -> exit({:answer, Client.generate_image("a cat", opts)}) end)

    assert TestOSProcess.await(fn -> StarweaveImage.subscribe(id) == :ok end)
    assert_receive {:starweave_image, ^id, {:progress, %{phase: :denoising}}}, 120_000
    {pid, monitor}
  end

  test "2: without model and settings the metadata names what really drew" do
    assert {:ok, data, metadata} = Client.generate_image("a red apple")
    assert png_size(data) == {512, 512}
    assert metadata.model == "starweave/tiny"
    assert metadata.model in Enum.map(StarweaveImage.models(), & &1.id)
    assert [%{resident: resident}] = StarweaveImage.status().sidecars
    assert metadata.model in resident
  end

  @tag :slow
  test "3: 200 of 200 requests with seed -1 succeed, each with a seed of its own that its callers can keep" do
    seeds =
      1..200
      |> Task.async_stream(fn _ -> Client.generate_image("a red apple", [seed: -1] ++ @small) end,
        max_concurrency: 8,
        timeout: 240_000
      )
      |> Enum.map(fn {:ok, {:ok, data, metadata}} ->
        assert png_size(data) == {64, 64}
        metadata.seed
      end)

    assert length(Enum.uniq(seeds)) == 200
    assert Enum.all?(seeds, &(&1 in 0..0x7FFFFFFF))

    # Any of them gives its picture again; those at and over the bounds are drawn as well, or refused by name.
    again = fn seed -> Client.generate_image("a red apple", [seed: seed] ++ @small) end
    for seed <- [hd(seeds), 0, 2 ** 31], do: assert({:ok, _, %{seed: ^seed}} = again.(seed))
    assert {:error, "seed must be an integer" <> _} = again.(2 ** 63)
  end

  test "4: the application is up, and errors come at once, whatever is wrong with Python" do
    for {what, opts, answer} <- [
          {NoPython, [python: "/no/such/python"], @unavailable},
          {EndsAtOnce, [python: "/bin/false"], @unavailable},
          {Broken, [python: TestInstance.fake("reports_missing_package")], @unavailable},
          {Off, [enabled: false], {:error, "Image generation is disabled"}}
        ] do
      name = Module.concat(__MODULE__, what)
      client = Module.concat(name, "Client")

      images = [
        {StarweaveImage, [name: name] ++ opts},
        {StarweaveImage.Client, name: client, instance: name}
      ]

      supervisor = start_supervised!(tree(images, Module.concat(name, "Host")))

      assert %{active: 4, workers: 2} = Supervisor.count_children(supervisor)
      refute StarweaveImage.Client.available?(client: client, wait: false)
      refute StarweaveImage.Client.available?(client: client)

      assert {what, StarweaveImage.Client.generate_image("a cat", client: client)} ==
               {what, answer}

      assert %{active: 4, workers: 2} = Supervisor.count_children(supervisor)
      stop_supervised!(Module.concat(name, "Host"))
    end
  end

  test "6: more than are let wait are told so" do
    name = TestInstance.start_ready("honest", capacity: 1, max_queue: 1)
    client = Module.concat(name, "Client")
    start_supervised!({StarweaveImage.Client, name: client, instance: name})

    draw = fn prompt, opts ->
      StarweaveImage.Client.generate_image(prompt, [client: client] ++ opts)
    end

    running = Task.async(fn -> draw.("hold", id: "held") end)
    TestInstance.await_running(name, "held")
    waiting = Task.async(fn -> draw.("hold", timeout: 120_000) end)
    assert TestOSProcess.await(fn -> StarweaveImage.status(instance: name).queue.queued == 1 end)
    assert {:error, "the queue is full (1 requests wait)" <> _} = draw.("a cat", [])
    for call <- [running, waiting], do: Task.shutdown(call, :brutal_kill)
    # Those who are gone hold nobody up.
    assert {:ok, _, _} = draw.("a cat", [])
  end

  test "7: a caller that dies takes its work with it, and the next is served" do
    {pid, monitor} = long("left")
    Process.exit(pid, :kill)
    assert_receive {:DOWN, ^monitor, :process, ^pid, :killed}
    assert_receive {:starweave_image, "left", {:error, %{kind: :cancelled}}}, 60_000
    assert {:ok, _, _} = Client.generate_image("a red apple", @small)
    assert TestOSProcess.await(fn -> StarweaveImage.status().queue.running == 0 end)
    refute_received {:starweave_image, "left", {:image, _}}
  end

  test "8: Python killed in the middle: the image comes, the health tells the truth, nobody else is touched" do
    bystanders = for {id, pid, _, _} <- children(), id != StarweaveImage, do: {id, pid}
    {pid, monitor} = long("killed")
    [%{os_pid: os_pid}] = StarweaveImage.status().sidecars
    TestOSProcess.signal(os_pid, "KILL")
    assert TestOSProcess.await(fn -> not Client.available?(wait: false) end)
    assert_receive {:starweave_image, "killed", {:progress, %{attempt: 2}}}, 120_000
    assert Client.available?(wait: false)
    :ok = StarweaveImage.cancel("killed")
    answer = {:answer, {:error, "the request was cancelled"}}
    assert_receive {:DOWN, ^monitor, :process, ^pid, ^answer}, 60_000

    assert {:ok, _, _} = Client.generate_image("a red apple", @small)
    assert bystanders == for({id, pid, _, _} <- children(), id != StarweaveImage, do: {id, pid})
    refute File.exists?("/proc/#{os_pid}")
  end

  test "9: a first request waits for the load and tells of it" do
    :ok = StarweaveImage.load_model("starweave/tiny")
    :ok = StarweaveImage.unload_model("starweave/tiny")
    opts = [id: "cold", steps: 100, width: 64, height: 64, num_images: 4]
    cold = Task.async(fn -> Client.generate_image("a red apple", opts) end)
    assert TestOSProcess.await(fn -> StarweaveImage.subscribe("cold") == :ok end)
    assert_receive {:starweave_image, "cold", {:progress, %{phase: :loading}}}, 60_000
    assert Client.available?(wait: false)
    assert {:ok, _, %{debug_info: %{"load_ms" => _}}} = Task.await(cold, 240_000)
    assert %{error: nil} = StarweaveImage.status()

    assert %{state: :loaded, error: nil} =
             Enum.find(StarweaveImage.models(), &(&1.id == "starweave/tiny"))
  end

  test "10: what the model's own limits refuse names the field, and no path or trace" do
    for {opts, field} <- [
          {[width: 1032, height: 64], "width"},
          {[height: 4096, width: 64], "height"},
          {[steps: 101], "steps"},
          {[guidance_scale: 20.5], "guidance_scale"},
          {[scheduler: "no_such_scheduler"], "scheduler"},
          {[image: <<0x89, "PNG\r\n", 0x1A, "\n", 0::64>>], "image"}
        ] do
      assert {:error, sentence} = Client.generate_image("a red apple", opts ++ @small)
      assert {field, sentence =~ field} == {field, true}
      refute sentence =~ ~r"/(home|root|tmp|usr|var|work)/|\\.py\\b|Traceback|#PID"
    end

    assert {:ok, _, _} = Client.generate_image("a red 🍎 ❤️ — élan 雪", @small)
    refute_received _
  end

  defp children, do: Supervisor.which_children(Module.concat(__MODULE__, "Supervisor"))
end
