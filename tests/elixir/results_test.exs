defmodule StarweaveImage.ResultsTest do
  # Results that are no pictures: from the process that makes them to whoever waits, and over a restart.
  use ExUnit.Case, async: true

  import StarweaveImage.TestInstance

  alias StarweaveImage.{Image, Result, Text}

  doctest Result
  doctest StarweaveImage.Queue.Job

  @facts %{"tags" => ["round", "red"], "sure" => 0.5}
  @others [vector: "image/svg+xml", video: "image/webp", mesh: "model/gltf-binary"]

  defp digest(data), do: Base.encode16(:crypto.hash(:sha256, data), case: :lower)

  test "a text comes as text" do
    instance = start_ready("makes_other_things")
    assert {:ok, %Text{} = text} = StarweaveImage.generate("text", instance: instance, seed: 3)
    assert text.text == "a text, seed 3"
    assert {text.facts, text.seed, text.index, text.attempts} == {@facts, 3, 0, 1}
    assert {text.model, text.prompt} == {"starweave/tiny", "text"}
    assert text.sha256 == digest(text.text)
    assert text.timings.total == 1
  end

  test "what else there is comes as a file that says what it is" do
    instance = start_ready("makes_other_things")

    for {kind, media_type} <- @others do
      opts = [instance: instance, seed: 3]
      assert {:ok, %Result{} = result} = StarweaveImage.generate(Atom.to_string(kind), opts)
      assert {result.kind, result.media_type} == {kind, media_type}
      assert result.data == "a #{kind}, seed 3"
      assert {result.facts, result.sha256} == {@facts, digest(result.data)}
      assert inspect(result) =~ "data: {:bytes, #{byte_size(result.data)}}"
    end

    assert {:ok, %Image{}} = StarweaveImage.generate("a fig", instance: instance)
  end

  test "several are told in order, as events of their own" do
    instance = start_ready("makes_other_things")
    opts = [instance: instance, seed: 3, num_images: 2]
    assert {:ok, [one, two]} = StarweaveImage.generate_many("mesh", 2, opts)
    assert {one.seed, two.seed, two.index} == {3, 4, 1}

    events = "mesh" |> StarweaveImage.stream(opts) |> Enum.to_list()
    assert [%Result{seed: 3}, %Result{seed: 4}] = for({:result, result} <- events, do: result)
    assert [] = for({:image, image} <- events, do: image)
  end

  @tag :tmp_dir
  test "they outlive the process and the instance", %{tmp_dir: folder} do
    opts = [journal: Path.join(folder, "journal")]
    instance = start_ready("makes_other_things", opts)

    kept =
      for {kind, _} <- [{:text, nil} | @others] do
        submitted = [instance: instance, durable: true, num_images: 2]
        {:ok, id} = StarweaveImage.submit(Atom.to_string(kind), submitted)
        :ok = StarweaveImage.subscribe(id, instance: instance)
        assert {:ok, [one, two]} = StarweaveImage.await_many(id, 20_000, instance: instance)
        assert_receive {:starweave_image, ^id, {:result, ^one}}, 10_000
        assert_receive {:starweave_image, ^id, {:result, ^two}}, 10_000
        {id, [one, two]}
      end

    :ok = stop_supervised(instance)
    instance = start_ready("makes_other_things", opts)

    for {id, results} <- kept do
      assert {:ok, ^results} = StarweaveImage.await_many(id, 20_000, instance: instance)
      :ok = StarweaveImage.subscribe(id, instance: instance)
      first = hd(results)
      assert_receive {:starweave_image, ^id, {:result, ^first}}, 10_000
    end

    # Nothing was made again.
    assert [_] = for(["generate", id] <- report(instance)["received"], do: id)
  end
end
