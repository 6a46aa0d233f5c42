defmodule StarweaveImage.RequestTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.{Error, Options, Request, Schema}

  doctest StarweaveImage.Request

  # tests/contract has what both languages must agree on; here is what only Elixir knows.

  defp refused(opts) do
    assert {:error, %Error{kind: :invalid_request} = error} = Request.new("a red apple", opts)
    {error.details.field, error.message}
  end

  defp accepted(opts) do
    assert {:ok, request} = Request.new("a red apple", opts)
    request
  end

  test "a prompt is enough" do
    assert %Request{
             model: nil,
             width: nil,
             steps: nil,
             num_images: 1,
             format: :png,
             quality: 90,
             metadata: true,
             reproducible: false,
             instance: StarweaveImage,
             user_id: nil,
             context: [],
             priority: :normal,
             timeout: 600_000
           } = accepted([])
  end

  test "options may be a map, and of equal names the first counts" do
    assert accepted(%{steps: 5}).steps == 5
    assert accepted(steps: 5, steps: 9).steps == 5
  end

  test "options that are none" do
    for opts <- [:steps, "steps", [1], [{"steps", 5}], nil, %URI{}] do
      assert {nil, "options must be a keyword list or a map, got " <> _} = refused(opts)
    end

    assert refused(%{"steps" => 5}) == {"steps", ~S(unknown option "steps", did you mean :steps?)}
    assert refused(%{1 => 5}) == {1, "unknown option 1"}
  end

  test "an unknown option names the nearest known one" do
    for {slip, meant} <- [
          guidance_scle: :guidance_scale,
          widht: :width,
          negativ_prompt: :negative_prompt,
          number_of_images: :num_images,
          time_out: :timeout
        ] do
      assert refused([{slip, 1}]) ==
               {slip, "unknown option #{inspect(slip)}, did you mean #{inspect(meant)}?"}
    end
  end

  test "an unknown option that is near to none is not guessed at" do
    for name <- [:foo, :host, :cfg, :prompt, :verbose, :max_tokens, :lora] do
      assert refused([{name, 1}]) == {name, "unknown option #{inspect(name)}"}
    end

    long = String.duplicate("seed", 1_000_000)
    assert refused(%{long => 1}) == {long, "unknown option 4000000 bytes of text"}
  end

  test "names that come as strings become atoms, what is unknown or no pair stays as it is" do
    assert Request.with_atoms(%{"width" => 512, seed: 1}) == [seed: 1, width: 512]
    assert Request.with_atoms([{"width", 512}, {"steps", 2}]) == [width: 512, steps: 2]
    unknown = Request.with_atoms([{"width", 512}, {"wdth", 1}])
    assert unknown == %{:width => 512, "wdth" => 1}
    assert {:error, %{details: %{field: "wdth"}}} = Request.new("a red apple", unknown)

    for other <- [nil, "width", [1], [{:a, 1} | :b], {:a, 1}, URI.parse("a")],
        do: assert(Request.with_atoms(other) == other)
  end

  test "200 fresh seeds are 200 seeds, all of them in range, and a given one stays" do
    for opts <- [[], [seed: nil], [seed: -1]] do
      seeds = for _ <- 1..200, do: accepted(opts).seed
      # With those of all its images it stays exact in JavaScript.
      assert Enum.all?(seeds, &(&1 in 0..(2 ** 53 - 17)))
      assert length(Enum.uniq(seeds)) == 200
    end

    assert accepted(seed: 0).seed == 0
  end

  test "an id is drawn where none is given" do
    ids = for _ <- 1..200, do: accepted([]).id
    assert Enum.all?(ids, &(&1 =~ ~r/\A[0-9a-f]{32}\z/))
    assert length(Enum.uniq(ids)) == 200
    assert accepted(id: "mine").id == "mine"
  end

  test "numbers become floats and words become atoms" do
    assert accepted(guidance_scale: 7).guidance_scale === 7.0

    assert %{format: :webp, priority: :background} =
             accepted(format: "webp", priority: "background")

    assert %{format: :jpeg} = accepted(format: :jpeg)
  end

  test "minus zero is zero" do
    for option <- [:guidance_scale, :strength, :variation_strength] do
      assert {:ok, request} = Request.new("a red apple", [{option, -0.0}])
      assert <<Map.fetch!(request, option)::float>> == <<0.0::float>>
    end
  end

  test "times and priorities are as strict as what goes over the wire" do
    for option <- [:timeout, :queue_timeout, :run_timeout],
        value <- [0, -1, 86_400_001, 2 ** 63, 10 ** 400, 1_000.0, true, "1000", :infinity, [1000]] do
      assert {:error, error} = Request.new("a red apple", [{option, value}])
      assert error.details.field == option
      assert error.message =~ "#{option} must be an integer from 1 to 86400000, got "
      assert byte_size(error.message) < 120
    end

    for value <- [1, true, "urgent", "Normal", [:normal]] do
      assert {:error, error} = Request.new("a red apple", priority: value)
      assert error.message =~ "priority must be one of interactive, normal, background, got "
    end
  end

  test "the options that stay here" do
    assert accepted(instance: MyApp.Images).instance == MyApp.Images
    assert accepted(user_id: String.duplicate("é", 64)).user_id == String.duplicate("é", 64)

    assert length(accepted(context: List.duplicate(String.duplicate("x", 8192), 64)).context) ==
             64

    for priority <- [:interactive, :normal, :background], do: accepted(priority: priority)
    for timeout <- [1, 86_400_000], do: assert(accepted(timeout: timeout).timeout == timeout)

    for {field, values} <- [
          instance: ["StarweaveImage", true, 1],
          user_id: ["", String.duplicate("x", 129), 7, <<0xFF>>, "a\0"],
          context: [
            "text",
            List.duplicate("x", 65),
            [String.duplicate("x", 8193)],
            [1],
            ["a" | "b"]
          ],
          priority: [:urgent, "urgent", 1],
          timeout: [0, -1, 86_400_001, 1.0, :infinity],
          queue_timeout: [0, 86_400_001, "1"],
          run_timeout: [0, 86_400_001, "1"],
          fallback: [1, "true"],
          durable: [1, "true"]
        ],
        value <- values do
      assert {^field, message} = refused([{field, value}])
      assert String.starts_with?(message, "#{field} must be ")
    end
  end

  test "a message repeats what is short and counts what is long" do
    for {value, shown} <- [
          {250, "250"},
          {64.0, "64.0"},
          {true, "true"},
          {:nan, ":nan"},
          {"wide", ~S("wide")},
          {String.duplicate("x", 33), "33 bytes of text"},
          {"a\0", "2 bytes of text"},
          {<<0xFF, 0xFE>>, "2 bytes"},
          {[64], "a list"},
          {%{w: 64}, "a map"},
          {{64, 64}, "something else"}
        ] do
      assert refused(width: value) ==
               {:width, "width must be a multiple of 8 from 64 to 4096, got #{shown}"}
    end
  end

  test "the wire gets what is set, and bytes as bytes" do
    image = <<0xFF, 0xD8, 0xFF, 0::80>>
    request = accepted(id: "r1", seed: 7, image: image, width: 64, user_id: "u", context: ["c"])

    assert Request.to_wire(request, 1_500) == %{
             t: :generate,
             id: "r1",
             prompt: "a red apple",
             seed: 7,
             width: 64,
             image: {:bin, image},
             strength: 0.8,
             effort: :standard,
             num_images: 1,
             format: :png,
             quality: 90,
             metadata: true,
             reproducible: false,
             preview: false,
             timeout_ms: 1_500
           }
  end

  test "bytes counts all that a request holds" do
    image = <<0xFF, 0xD8, 0xFF, 0::80>>
    assert Request.bytes(accepted([])) == 11

    request =
      accepted(
        negative_prompt: "é",
        style: "ink",
        image: image,
        mask: image,
        context: ["a", "bc"]
      )

    assert Request.bytes(request) == 11 + 2 + 3 + 13 + 13 + 3
  end

  describe "the same request" do
    test "is one with the same content, user and durability, whatever its id, urgency and limits" do
      asked = accepted(width: 256, user_id: "ann")

      for opts <- [
            [],
            [id: "other"],
            [priority: :interactive],
            [timeout: 1],
            [preview: true],
            [queue_timeout: 5, run_timeout: 5, fallback: true]
          ] do
        assert Request.same?(asked, accepted([width: 256, user_id: "ann"] ++ opts))
      end

      for opts <- [
            [width: 264],
            [user_id: "bob"],
            [user_id: nil],
            [durable: true],
            [steps: 4],
            [context: ["a"]],
            [reproducible: true],
            [seed: 1]
          ] do
        refute Request.same?(asked, accepted(opts ++ [width: 256, user_id: "ann"]))
      end
    end

    test "has the seed that was drawn for it, or also a fresh one" do
      drawn = accepted([])
      assert Request.same?(drawn, accepted(seed: -1))
      assert Request.same?(drawn, accepted(seed: drawn.seed))
      assert Request.same?(accepted(seed: 3), accepted(seed: 3))
      refute Request.same?(accepted(seed: 3), accepted(seed: 4))
    end

    test "comes back from its record, also through msgpack" do
      image = <<137, "PNG", 13, 10, 26, 10, 255, 0, 0, 0>>

      for opts <- [
            [],
            [seed: 7, image: image, strength: 0.5, format: :webp, context: ["a", "b"]],
            [durable: true, priority: :background, user_id: "ann", timeout: 5, fallback: true]
          ] do
        asked = accepted([instance: MyApp.Images] ++ opts)

        {:ok, record, ""} =
          asked
          |> Request.to_record()
          |> StarweaveImage.Msgpack.encode!()
          |> IO.iodata_to_binary()
          |> StarweaveImage.Msgpack.decode()

        assert Request.restore(record, MyApp.Images) == {:ok, asked}
      end
    end

    test "comes back from a record of an earlier release, with what is new at its default" do
      record = %{
        "id" => "order-17",
        "prompt" => "a red apple",
        "seed" => 7,
        "fresh_seed" => true,
        "width" => 256,
        "num_images" => 2,
        "format" => "png",
        "quality" => 90,
        "metadata" => true,
        "reproducible" => false,
        "preview" => false,
        "context" => [],
        "priority" => "normal",
        "timeout" => 600_000,
        "fallback" => false,
        "durable" => true
      }

      assert {:ok, request} = Request.restore(record, MyApp.Images)
      assert %{effort: :standard, strength: 0.8, images: nil, task: nil} = request
      asked = accepted(id: "order-17", seed: 7, width: 256, num_images: 2, durable: true)
      assert Request.same?(%{asked | fresh_seed?: true}, request)
    end
  end

  test "every option is in the docs" do
    documented =
      Regex.scan(~r/^  \* `:(\w+)` - /m, Options.docs(Schema.groups()), capture: :all_but_first)

    fields =
      for field <- Map.keys(accepted([])),
          field not in [:__struct__, :prompt, :content, :fresh_seed?],
          do: [to_string(field)]

    assert Enum.sort(documented) == Enum.sort(fields)
  end
end
