defmodule StarweaveImage.LifecycleTest do
  # The real sidecar with the embedded model, and applications that end in every way: who is left.
  use ExUnit.Case, async: true

  import StarweaveImage.TestInstance
  import StarweaveImage.TestApplication, only: [await_line: 2, holding: 2, misbehaving: 3]
  import StarweaveImage.TestOSProcess

  alias StarweaveImage.{Environment, Image, TestApplication}

  @moduletag :tmp_dir
  @moduletag timeout: 300_000

  defp python do
    assert {:ok, python} = Environment.python()
    python
  end

  # Kills the application as nothing else does, and proves that nothing of it is left soon after.
  defp assert_nothing_left(application, sidecar) do
    family = family(sidecar)
    assert sidecar in family
    signal(application.beam, "KILL")
    assert [] == await_gone([application.beam | family], 5_000)
    assert [] == family(sidecar)
  end

  describe "kill -9 of the application leaves nothing after 5 s" do
    @tag :slow
    test "as the sidecar starts and before it has said anything", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [python(), "0"])
      assert_nothing_left(application, TestApplication.sidecar(application))
    end

    @tag :slow
    test "while it imports", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [python(), "0"])
      await_line(application, ~r/phase=starting ready=false/)
      assert_nothing_left(application, TestApplication.sidecar(application))
    end

    @tag :slow
    test "while it imports and native code holds the interpreter", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [holding(folder, python()), "0"])
      await_line(application, ~r/phase=starting ready=false/)
      sidecar = TestApplication.sidecar(application)
      signal(sidecar, "USR1")
      await_line(application, ~r/holding/)
      assert_nothing_left(application, sidecar)
    end

    @tag :slow
    test "while it is idle", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [python(), "0"])
      await_line(application, ~r/phase=ready ready=true/)
      assert_nothing_left(application, TestApplication.sidecar(application))
    end

    @tag :slow
    test "while it loads a model", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [python(), "0", "generate"])
      await_line(application, ~r/event progress loading/)
      assert_nothing_left(application, TestApplication.sidecar(application))
    end

    @tag :slow
    test "while it works", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [python(), "0", "generate"])
      await_line(application, ~r/event progress denoising/)
      assert_nothing_left(application, TestApplication.sidecar(application))
    end

    test "while it works and native code holds the interpreter", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [holding(folder, python()), "0", "generate"])
      await_line(application, ~r/event progress denoising/)
      sidecar = TestApplication.sidecar(application)
      signal(sidecar, "USR1")
      await_line(application, ~r/holding/)
      assert_nothing_left(application, sidecar)
    end

    @tag :slow
    test "while it drains", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [python(), "60000", "generate"])
      await_line(application, ~r/event progress denoising/)
      # What `System.stop/0` does.
      signal(application.beam, "TERM")
      await_line(application, ~r/phase=draining/)
      assert_nothing_left(application, TestApplication.sidecar(application))
    end
  end

  describe "the end of the application by System.stop" do
    # SIGTERM is what makes the BEAM call it.
    defp assert_stops(application, sidecar, within) do
      family = family(sidecar)
      signal(application.beam, "TERM")
      assert [] == await_gone([application.beam], within)
      assert [] == await_gone(family, 1_000)
      assert [] == family(sidecar)
    end

    test "takes moments with an idle sidecar", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [fake("honest"), "2000"])
      await_line(application, ~r/phase=ready ready=true/)
      assert_stops(application, TestApplication.sidecar(application), 5_000)
    end

    test "takes under 10 s with one that ignores it", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [fake("ignores_sigterm"), "2000"])
      await_line(application, ~r/phase=ready ready=true/)
      assert_stops(application, TestApplication.sidecar(application), 10_000)
    end

    test "takes under 10 s with one stopped in the middle of its work", %{tmp_dir: folder} do
      application = TestApplication.start(folder, [fake("stops"), "2000", "generate"])
      await_line(application, ~r/phase=busy ready=true/)
      assert_stops(application, TestApplication.sidecar(application), 10_000)
    end

    test "takes under 10 s with megabytes on the way to one that does not read", %{
      tmp_dir: folder
    } do
      application =
        TestApplication.start(folder, [fake("reads_nothing"), "2000", "generate-large"])

      await_line(application, ~r/event queued/)
      await_line(application, ~r/phase=ready ready=true/)
      assert_stops(application, TestApplication.sidecar(application), 10_000)
    end
  end

  describe "a hang of the sidecar" do
    @tag :slow
    test "in native code that holds the interpreter, in the middle of a request", %{
      tmp_dir: folder
    } do
      python = holding(folder, python())
      instance = start(nil, python: python, heartbeat_timeout: 6_000, start_timeout: 240_000)
      assert await(fn -> StarweaveImage.available?(instance: instance) end, 240_000)
      victim = os_pid(instance)
      opts = [seed: 5, steps: 50, width: 64, height: 64, instance: instance]
      {:ok, id} = StarweaveImage.submit("a red apple", opts)
      :ok = StarweaveImage.subscribe(id, instance: instance)
      assert_receive {:starweave_image, ^id, {:progress, %{phase: :denoising, step: 2}}}, 120_000
      signal(victim, "USR1")

      assert {:ok, %Image{attempts: 2, seed: 5}} =
               StarweaveImage.await(id, 120_000, instance: instance)

      assert [] == await_gone([victim], 5_000)
    end
  end

  describe "work that no cancel reaches" do
    @places ~w(decoding tokenizing stepping encoding)

    @tag :slow
    test "costs no slot for longer than its own limit, and the others nothing but time", %{
      tmp_dir: folder
    } do
      # Each request hangs where its id says.
      python = misbehaving(folder, python(), "hang_where_named")
      opts = [cancel_timeout: 2_000, capacity: 5, start_timeout: 240_000, heartbeat_interval: 200]
      instance = start(nil, [python: python, heartbeat_timeout: 60_000] ++ opts)
      assert await(fn -> StarweaveImage.available?(instance: instance) end, 240_000)

      small = [steps: 4, width: 64, height: 64, instance: instance]
      {:ok, %Image{data: png}} = StarweaveImage.generate("a red apple", small)
      victim = os_pid(instance)
      signal(victim, "USR1")

      for place <- @places do
        image = if place == "decoding", do: [image: png], else: []
        {:ok, _} = StarweaveImage.submit("a red apple", [id: place] ++ image ++ small)
      end

      at_work = fn ->
        for r <- sidecar(instance).requests, r.step_age_ms > 1_000, not r.waits, do: r.id
      end

      assert await(fn -> Enum.sort(at_work.()) == Enum.sort(@places) end, 120_000)

      {:ok, id} =
        StarweaveImage.submit("a red apple", [seed: 5, steps: 100, num_images: 8] ++ tl(small))

      :ok = StarweaveImage.subscribe(id, instance: instance)
      assert_receive {:starweave_image, ^id, {:progress, %{phase: :denoising}}}, 120_000
      for place <- @places, do: :ok = StarweaveImage.cancel(place, instance: instance)

      assert [] == await_gone([victim], 60_000)

      assert {:ok, %Image{seed: 5, attempts: 2}} =
               StarweaveImage.await(id, 240_000, instance: instance)

      assert {:ok, %Image{attempts: 1}} = StarweaveImage.generate("a red apple", small)
      assert %{running: 0, queued: 0} = StarweaveImage.status(instance: instance).queue

      for place <- @places do
        assert {:error, %{kind: :cancelled}} =
                 StarweaveImage.await(place, 1_000, instance: instance)
      end
    end
  end

  describe "kill -9 of the sidecar" do
    @requests for n <- 1..8, do: {"a #{Enum.at(~w(red blue green), rem(n, 3))} star", n}

    test "in the middle of eight requests: each gets the bytes it would have got" do
      instance =
        start(nil, heartbeat_interval: 200, heartbeat_timeout: 60_000, start_timeout: 240_000)

      assert await(fn -> StarweaveImage.available?(instance: instance) end, 240_000)

      make = fn {prompt, seed} ->
        opts = [seed: seed, steps: 5, width: 64, height: 64, reproducible: true]
        StarweaveImage.generate!(prompt, [instance: instance] ++ opts)
      end

      alone = Enum.map(@requests, make)
      victim = os_pid(instance)
      id = "first"
      opts = [seed: 99, steps: 50, width: 64, height: 64, id: id, instance: instance]
      undisturbed = StarweaveImage.generate!("a red apple", Keyword.delete(opts, :id))

      {:ok, ^id} = StarweaveImage.submit("a red apple", opts)
      :ok = StarweaveImage.subscribe(id, instance: instance)
      together = Enum.map(@requests, fn request -> Task.async(fn -> make.(request) end) end)
      assert_receive {:starweave_image, ^id, {:progress, %{phase: :denoising, step: 2}}}, 120_000
      family = family(victim)
      signal(victim, "KILL")

      images = Task.await_many(together, 240_000)
      assert Enum.map(images, & &1.sha256) == Enum.map(alone, & &1.sha256)

      assert {:ok, %Image{attempts: 2} = image} =
               StarweaveImage.await(id, 120_000, instance: instance)

      assert image.data == undisturbed.data
      assert [] == await_gone(family, 5_000)
      assert sidecar(instance).generation == 2
    end
  end
end
