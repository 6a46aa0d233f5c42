defmodule StarweaveImageTest do
  # One real sidecar with the embedded model serves all tests here.
  use ExUnit.Case, async: false

  alias StarweaveImage.{Error, Image}

  doctest StarweaveImage
  doctest StarweaveImage.Error
  doctest StarweaveImage.Image

  @small [width: 64, height: 64, steps: 4]
  # In company a picture is the one drawn alone to rounding only.
  @exact [reproducible: true] ++ @small

  setup_all do
    start_supervised!(StarweaveImage)
    :ok = StarweaveImage.load_model("starweave/tiny", timeout: 120_000)
  end

  # What a test cancelled may hold its slot, and the model, until the sidecar has confirmed it.
  setup do
    idle? = fn -> StarweaveImage.status().queue.running == 0 end
    assert StarweaveImage.TestOSProcess.await(idle?)

    :ok
  end

  test "generate/2 gives a picture with all that made it" do
    assert {:ok, %Image{} = image} = StarweaveImage.generate("a red apple", [seed: 7] ++ @small)
    assert <<0x89, "PNG", _::binary>> = image.data
    assert {image.width, image.height, image.format} == {64, 64, :png}
    assert {image.seed, image.steps, image.model} == {7, 4, "starweave/tiny"}
    assert image.sha256 == Base.encode16(:crypto.hash(:sha256, image.data), case: :lower)
    assert image.parameters["prompt"] == "a red apple"
    assert image.timings.total >= image.timings.denoise
    refute_received _
  end

  test "the same seed gives the same bytes, no seed a fresh and reported one" do
    {:ok, one} = StarweaveImage.generate("a red apple", [seed: 7] ++ @small)
    {:ok, two} = StarweaveImage.generate("a red apple", [seed: 7] ++ @small)
    assert one.data == two.data

    {:ok, three} = StarweaveImage.generate("a red apple", [seed: -1] ++ @small)
    {:ok, four} = StarweaveImage.generate("a red apple", @small)
    assert three.seed != four.seed
    {:ok, again} = StarweaveImage.generate("a red apple", [seed: four.seed] ++ @small)
    assert again.data == four.data
  end

  test "generate_many/3 gives n seeds, each as a single request would" do
    {:ok, images} = StarweaveImage.generate_many("a blue star", 3, [seed: 10] ++ @exact)
    assert Enum.map(images, & &1.seed) == [10, 11, 12]
    assert Enum.map(images, & &1.index) == [0, 1, 2]

    # What each says of itself is what is written in its file.
    for image <- images do
      assert image.parameters["seed"] == image.seed
      assert image.data =~ "Seed: #{image.seed},"
      refute is_map_key(image.parameters, "seeds")
    end

    {:ok, single} = StarweaveImage.generate("a blue star", [seed: 12] ++ @exact)
    assert List.last(images).data == single.data
  end

  test "edit/3 and variations/2 start from a picture, and go as far as they are let" do
    apple = StarweaveImage.generate!("a red apple", [seed: 7] ++ @exact)
    {:ok, edited} = StarweaveImage.edit(apple, "a blue star", seed: 1, steps: 4)
    assert {edited.width, edited.height, edited.prompt} == {64, 64, "a blue star"}
    assert edited.parameters["task"] == "image_to_image"
    assert edited.parameters["image_sha256"] == apple.sha256

    assert {:ok, ^edited} =
             same(edited, StarweaveImage.edit(apple.data, "a blue star", seed: 1, steps: 4))

    {:ok, images} = StarweaveImage.variations(apple, num_images: 3, seed: 20, steps: 4)
    assert Enum.map(images, &{&1.seed, &1.prompt}) == for(n <- 20..22, do: {n, "a red apple"})
    assert images |> Enum.map(& &1.sha256) |> Enum.uniq() |> length() == 3
    assert hd(images).parameters["strength"] == 0.6

    {:ok, images} = StarweaveImage.variations("a red apple", [seed: 7] ++ @exact)
    assert length(images) == 4
    assert hd(images).data == apple.data

    near = [seed: 7, variation_strength: 0.3] ++ @exact
    {:ok, [same, varied]} = StarweaveImage.variations("a red apple", [num_images: 2] ++ near)
    assert {same.seed, varied.seed} == {7, 8}
    assert varied.parameters["seed"] == 7 and varied.parameters["variation_strength"] == 0.3
    assert {same.parameters["variation_seed"], varied.parameters["variation_seed"]} == {7, 8}
    {:ok, again} = StarweaveImage.generate("a red apple", [variation_seed: varied.seed] ++ near)
    assert again.data == varied.data
    assert varied.data not in [same.data | Enum.map(images, & &1.data)]

    assert {:ok, [_]} =
             StarweaveImage.variations(apple.data, prompt: "a red apple", num_images: 1, steps: 2)
  end

  # But for what no two answers share.
  defp same(image, {:ok, other}), do: {:ok, %{other | id: image.id, timings: image.timings}}

  test "inpaint/4 needs a mask of the picture's size" do
    apple = StarweaveImage.generate!("a red apple", [seed: 7] ++ @small)
    {:ok, inpainted} = StarweaveImage.inpaint(apple, apple, "a blue star", seed: 1, steps: 4)
    assert inpainted.parameters["task"] == "inpaint"
    large = StarweaveImage.generate!("a red apple", seed: 7, width: 128, height: 64, steps: 2)

    assert {:error, %Error{kind: :invalid_request, details: %{field: :mask}} = error} =
             StarweaveImage.inpaint(apple, large, "a blue star")

    assert error.message == "mask must have the size of image, 64x64, got 128x64"
  end

  test "eight callers at once get the pictures that they would get alone" do
    requests =
      for n <- 1..8,
          do: {"a #{Enum.at(~w(red blue green), rem(n, 3))} star", [seed: n, steps: 2 + n]}

    make = fn {prompt, opts} ->
      StarweaveImage.generate!(prompt, Keyword.merge(@exact, opts)).sha256
    end

    alone = Enum.map(requests, make)

    together =
      requests
      |> Task.async_stream(make, max_concurrency: 8, timeout: 120_000)
      |> Enum.map(&elem(&1, 1))

    assert together == alone
  end

  test "generate!/2 raises the error" do
    assert %Image{} = StarweaveImage.generate!("a red apple", @small)

    assert_raise Error, "width must be a multiple of 8 from 64 to 4096, got 250", fn ->
      StarweaveImage.generate!("a red apple", width: 250)
    end
  end

  test "submit/2 outlives its caller, and its result can be had twice" do
    {:ok, id} = Task.await(Task.async(fn -> StarweaveImage.submit("a red apple", @small) end))
    assert {:ok, %Image{id: ^id} = image} = StarweaveImage.await(id, 60_000)
    assert {:ok, ^image} = StarweaveImage.await(id, 60_000)
    assert {:error, :finished} = StarweaveImage.cancel(id)
  end

  test "stream/2 tells each step and ends with the image" do
    events = Enum.to_list(StarweaveImage.stream("a red apple", [num_images: 2] ++ @small))
    steps = for {:progress, %{phase: :denoising, image: i, step: s}} <- events, s > 0, do: {i, s}
    # Both are drawn at once; each in its own order.
    for image <- 0..1, do: assert(for({^image, s} <- steps, do: s) == [1, 2, 3, 4])
    assert [{:image, %Image{index: 0}}, {:image, %Image{index: 1}}] = Enum.take(events, -2)
    refute_received _
  end

  test "stream/2 with previews shows each image before it is there" do
    opts = [id: "shown", num_images: 2, width: 128, height: 64, steps: 20, preview: true]
    events = Enum.to_list(StarweaveImage.stream("a red apple", opts))
    previews = for {:preview, preview} <- events, do: preview
    {before, [{:image, _}, {:image, _}]} = Enum.split(events, -2)
    assert length(previews) == Enum.count(before, &match?({:preview, _}, &1))

    for index <- 0..1 do
      steps = for %{image: ^index, step: step} <- previews, do: step
      assert length(steps) in 1..10
      assert steps == Enum.uniq(Enum.sort(steps))
      assert Enum.all?(steps, &(&1 in 1..20))
    end

    for preview <- previews do
      assert %{id: "shown", format: :jpeg, width: 128, height: 64} = preview
      assert <<0xFF, 0xD8, 0xFF, _::binary>> = preview.data
      assert byte_size(preview.data) < 20_000
      # Its own bytes, not a piece of what was read from the port.
      assert :binary.referenced_byte_size(preview.data) == byte_size(preview.data)
    end

    refute_received _
  end

  test "a subscriber sees previews; one that was not asked for does not come" do
    {:ok, id} = StarweaveImage.submit("a red apple", [preview: true] ++ @small)
    :ok = StarweaveImage.subscribe(id)
    assert_receive {:starweave_image, ^id, {:preview, %{id: ^id, image: 0}}}, 60_000
    assert_receive {:starweave_image, ^id, {:image, _}}, 60_000
    :ok = StarweaveImage.unsubscribe(id)

    events = Enum.to_list(StarweaveImage.stream("a red apple", @small))
    refute Enum.any?(events, &match?({:preview, _}, &1))
    assert {:image, %Image{}} = List.last(events)
  end

  test "stream/2 of a bad request is one error" do
    assert [{:error, %Error{kind: :invalid_request}}] =
             Enum.to_list(StarweaveImage.stream("", []))
  end

  test "leaving a stream early cancels the request and leaves nothing behind" do
    [{:progress, _}] =
      "a red apple"
      |> StarweaveImage.stream(width: 64, height: 64, steps: 100, id: "left-early")
      |> Stream.filter(&match?({:progress, %{step: 2}}, &1))
      |> Enum.take(1)

    assert {:error, :not_found} = StarweaveImage.cancel("left-early")
    refute_received _
  end

  test "a subscriber sees the same events, also when it comes late" do
    {:ok, id} = StarweaveImage.submit("a red apple", @small)
    {:ok, _} = StarweaveImage.await(id, 60_000)
    :ok = StarweaveImage.subscribe(id)
    assert_received {:starweave_image, ^id, {:image, %Image{}}}
    :ok = StarweaveImage.unsubscribe(id)
    refute_received _
  end

  test "status, models and availability are answered during a generation" do
    :ok = StarweaveImage.load_model("starweave/tiny")
    {:ok, id} = StarweaveImage.submit("a red apple", width: 64, height: 64, steps: 100)
    assert %{state: state, sidecars: [%{running: running}]} = StarweaveImage.status()
    # The load before it may be the last that a heartbeat told.
    assert state in [:busy, :loading]
    assert id in running
    assert StarweaveImage.available?()
    assert %{state: :loaded, tasks: ["text_to_image" | _]} = tiny()
    :ok = StarweaveImage.cancel(id)
    assert {:error, %Error{kind: :cancelled}} = StarweaveImage.await(id, 1_000)
  end

  test "status, models and events are what their types say" do
    assert types(:status, StarweaveImage.status(instance: :no_such_instance)) == []

    # More than run at once, so that no list is empty.
    ids = for n <- 0..8, do: "typed#{n}"

    for id <- ids,
        do: {:ok, _} = StarweaveImage.submit("a cat", width: 64, height: 64, steps: 100, id: id)

    working? = fn ->
      Enum.any?(StarweaveImage.status().sidecars, &match?(%{requests: [_ | _]}, &1))
    end

    assert StarweaveImage.TestOSProcess.await(working?)
    assert %{queue: %{next: [_]}, sidecars: [_]} = status = StarweaveImage.status()
    assert types(:status, status) == []
    for id <- ids, do: :ok = StarweaveImage.cancel(id)
    assert [_, _ | _] = models = StarweaveImage.models()
    for model <- models, do: assert(types(:model, model) == [])

    events = Enum.to_list(StarweaveImage.stream("a red apple", [preview: true] ++ @small))

    assert [:image, :preview, :progress, :queued] =
             events |> Enum.map(&elem(&1, 0)) |> Enum.uniq() |> Enum.sort()

    for event <- events, do: assert(types(:event, event) == [])

    # The comparison sees what differs.
    [model | _] = models
    assert ["model.name is missing"] = types(:model, Map.delete(model, :name))
    assert ["model.nmae is undocumented" <> _] = types(:model, Map.put(model, :nmae, "x"))
    assert ["model.limits.max_size is nil"] = types(:model, put_in(model.limits.max_size, nil))
  end

  defp types(name, value), do: StarweaveImage.TestTypes.mismatches(StarweaveImage, name, value)

  test "available?/1 waits for nobody: not for a queue that does something else, nor for one that is gone" do
    alias StarweaveImage.TestInstance
    name = TestInstance.start_ready("honest")
    queue = Process.whereis(name)
    :sys.suspend(queue)
    # Whoever asked the queue would wait now.
    {:timeout, _} = catch_exit(GenServer.call(queue, :status, 50))
    assert StarweaveImage.available?(instance: name)
    start_supervised!({StarweaveImage.Client, name: __MODULE__.Client, instance: name})
    assert StarweaveImage.Client.available?(wait: false, client: __MODULE__.Client)

    monitor = Process.monitor(queue)
    Process.exit(queue, :kill)
    assert_receive {:DOWN, ^monitor, :process, _, :killed}
    TestInstance.await_state(name, :ready)
    assert StarweaveImage.available?(instance: name)

    started = TestInstance.start("never_ready")
    refute StarweaveImage.available?(instance: started)
  end

  test "each request that ends is one line in the log, without its prompt" do
    secret = "a red apple of #{System.unique_integer([:positive])}"

    log =
      ExUnit.CaptureLog.capture_log([metadata: [:request_id]], fn ->
        {:ok, _} = StarweaveImage.generate(secret, [id: "told"] ++ @small)
        {:ok, _} = StarweaveImage.generate_many(secret, 2, [id: "told-twice"] ++ @small)
        {:error, _} = StarweaveImage.generate(secret, id: "too-slow", timeout: 1)
        {:error, _} = StarweaveImage.generate(secret, id: "no-model", model: "no/such-model")
        # Refused before it was a request.
        {:error, _} = StarweaveImage.generate(secret, id: "refused", width: 250)
      end)

    refute log =~ secret
    lines = for line <- String.split(log, "\n"), line =~ "image request ", do: line
    assert [told, twice, slow, unknown] = lines

    assert told =~
             ~r/request_id=told .*image request told done model=starweave\/tiny steps=4 images=1 queue_ms=\d+ total_ms=\d+ attempts=1 rss_mb=\d+/

    assert twice =~ ~r/image request told-twice done model=starweave\/tiny steps=4 images=2 /
    assert slow =~ ~r/request_id=too-slow .*image request too-slow failed kind=timeout /
    assert unknown =~ ~r/image request no-model failed kind=model_not_found model=no\/such-model /
  end

  test "a model can be unloaded and comes back when it is asked for" do
    :ok = StarweaveImage.unload_model("starweave/tiny")
    assert {:ok, _} = StarweaveImage.generate("a red apple", @small)
    assert :ok = StarweaveImage.load_model("starweave/tiny")
    assert {:error, %Error{kind: :model_not_found}} = StarweaveImage.load_model("no/such-model")
    assert {:error, %Error{kind: :invalid_request}} = StarweaveImage.load_model("../etc")
  end

  test "await_ready/2 answers once the outcome of the start is known" do
    start_supervised!({StarweaveImage, name: Awaited})
    assert StarweaveImage.status(instance: Awaited).state == :starting
    refute StarweaveImage.available?(instance: Awaited)
    assert :ok = StarweaveImage.await_ready(120_000, instance: Awaited)
    assert StarweaveImage.available?(instance: Awaited)
  end

  test "an unknown model is one clear error, before any device work" do
    assert {:error, %Error{kind: :model_not_found} = error} =
             StarweaveImage.generate("a red apple", model: "no/such-model")

    assert error.message =~ "no/such-model"
    refute error.message =~ "/priv"
  end

  test "a default model whose folder is no model keeps the instance down, with the reason" do
    folder = Path.join(System.tmp_dir!(), "no-model")
    opts = [name: NoModel, models: [{"my/model", path: folder}], default_model: "my/model"]
    start_supervised!({StarweaveImage, opts})

    assert {:error, %Error{kind: :unavailable}} =
             StarweaveImage.await_ready(120_000, instance: NoModel)

    assert %{state: :down, error: reason} = StarweaveImage.status(instance: NoModel)
    assert reason =~ "my/model" and reason =~ "folder"
    refute reason =~ folder
    assert {:error, %Error{kind: :unavailable}} = StarweaveImage.generate("a", instance: NoModel)
    assert StarweaveImage.status().state == :ready
  end

  test "every format is what it says" do
    for {format, magic} <- [png: <<0x89, "PNG">>, jpeg: <<0xFF, 0xD8, 0xFF>>, webp: "RIFF"] do
      {:ok, image} = StarweaveImage.generate("a red apple", [format: format] ++ @small)
      assert String.starts_with?(image.data, magic)
      assert StarweaveImage.Image.to_data_uri(image) =~ "data:image/#{format};base64,"
    end
  end

  test "a model that is preloaded is there without a request, and tells what it takes" do
    options = [preload: ["starweave/tiny"], pinned: ["starweave/tiny"], memory_budget: 0]
    start_supervised!({StarweaveImage, [name: Preloaded] ++ options})
    assert :ok = StarweaveImage.await_ready(120_000, instance: Preloaded)

    loaded = fn ->
      Enum.find(StarweaveImage.models(instance: Preloaded), &(&1.state == :loaded))
    end

    assert StarweaveImage.TestOSProcess.await(fn -> loaded.() != nil end)
    assert %{id: "starweave/tiny", bytes: bytes, load_ms: load_ms, parked: false} = loaded.()
    assert bytes > 10_000_000 and load_ms > 0
    # Over its budget, and still there: it is pinned.
    assert {:ok, _} = StarweaveImage.generate("a red apple", [instance: Preloaded] ++ @small)
    assert [%{resident: ["starweave/tiny"]}] = StarweaveImage.status(instance: Preloaded).sidecars
  end

  @tag timeout: 300_000
  test "OpenVINO draws where its package is, and elsewhere the reason is told" do
    start_supervised!({StarweaveImage, name: Converted, backend: :openvino, device: "cpu"})

    # Other machines have no wheel of it, and so no test of what it draws.
    if :os.type() == {:unix, :darwin} or
         List.starts_with?(:erlang.system_info(:system_architecture), ~c"x86_64") do
      assert :ok = StarweaveImage.await_ready(120_000, instance: Converted)
      options = [seed: 7, instance: Converted] ++ @small
      assert {:ok, %Image{} = image} = StarweaveImage.generate("a red apple", options)
      assert %{"openvino" => _} = image.parameters["environment"]
      assert image.notices == []
    else
      assert {:error, error} = StarweaveImage.await_ready(120_000, instance: Converted)
      assert error.message =~ "mix image.setup --openvino"
    end
  end

  defp tiny, do: Enum.find(StarweaveImage.models(), &(&1.id == "starweave/tiny"))
end
