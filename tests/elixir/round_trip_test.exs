defmodule StarweaveImage.RoundTripTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.{Contract, Environment, Msgpack, Request}

  @script Path.expand("../support/python/msgpack_peer.py", __DIR__)
  @package Path.expand("../../priv/python", __DIR__)
  @deadline 60_000

  setup do
    {:ok, python} = Environment.python()
    seed = ExUnit.configuration()[:seed]
    :rand.seed(:exsss, seed)

    peer =
      Port.open({:spawn_executable, python}, [
        :binary,
        :exit_status,
        packet: 4,
        args: [@script],
        env: [{~c"PYTHONPATH", String.to_charlist(@package)}]
      ])

    %{peer: peer, seed: seed}
  end

  test "what Elixir writes is what Python reads, and Python writes the same bytes", %{peer: peer} do
    for _ <- 1..500 do
      term = term(0)
      bytes = encode(term)
      description = describe(term)

      for {codec, [echo, read]} <-
            Enum.zip([:msgpack, :msgspec], ask(peer, ["echo", {:bin, bytes}])) do
        assert {codec, read} == {codec, description}
        assert {codec, echo} == {codec, bytes}
      end
    end
  end

  test "what Python writes is what Elixir reads, and says again", %{peer: peer, seed: seed} do
    for batch <- 1..5, [bytes, description] <- ask(peer, ["draw", seed + batch]) do
      assert {:ok, term, ""} = Msgpack.decode(bytes)
      assert describe(term) == description

      # Of what was read one cannot tell text from bytes; as bytes all of it can be said.
      for [_bytes, read] <- ask(peer, ["echo", {:bin, term |> as_bytes() |> encode()}]) do
        assert read == description
      end
    end
  end

  test "every request that Elixir accepts is one that the sidecar accepts", %{peer: peer} do
    for _ <- 1..1_000 do
      options = options()
      assert {:ok, request} = Request.new(Enum.random(["a red apple", "🍎", "x\n"]), options)
      assert_heard(peer, request)
    end
  end

  test "also those of the contract", %{peer: peer} do
    accepted =
      for %{"request" => request} <- Contract.load("requests.jsonl"),
          {prompt, options} = request |> Contract.expand() |> Map.pop("prompt"),
          options = Map.new(options, fn {key, value} -> {String.to_atom(key), value} end),
          {:ok, request} <- [Request.new(prompt, options)] do
        assert_heard(peer, request)
      end

    assert length(accepted) > 100
  end

  defp assert_heard(peer, request) do
    sent = Request.to_wire(request, request.timeout)
    heard = ask(peer, ["generate", {:bin, encode(sent)}])

    for {name, value} <- sent, do: assert(heard["#{name}"] == as_heard(value))
  end

  defp as_heard({:bin, data}), do: data
  defp as_heard(values) when is_list(values), do: Enum.map(values, &as_heard/1)
  defp as_heard(word) when is_atom(word) and not is_boolean(word), do: Atom.to_string(word)
  defp as_heard(value), do: value

  defp ask(peer, request) do
    true = Port.command(peer, Msgpack.encode!(request))

    receive do
      {^peer, {:data, answer}} ->
        {:ok, answer, ""} = Msgpack.decode(answer)
        answer

      {^peer, {:exit_status, status}} ->
        flunk("Python ended with #{status}")
    after
      @deadline -> flunk("Python does not answer")
    end
  end

  defp encode(term), do: term |> Msgpack.encode!() |> IO.iodata_to_binary()

  ## Random terms, as random as the seed of ExUnit

  defp term(depth) do
    case :rand.uniform(if(depth > 4, do: 7, else: 11)) do
      1 ->
        Enum.random([nil, true, false])

      2 ->
        integer()

      3 ->
        float()

      4 ->
        text()

      5 ->
        {:bin, :rand.bytes(size())}

      6 ->
        {:bin, [:rand.bytes(size()), [text() | :rand.bytes(3)]]}

      7 ->
        Enum.random([:nan, :infinity, :neg_infinity, 0.0, -0.0, 5.0e-324, 1.7976931348623157e308])

      n when n in [8, 9] ->
        for _ <- items(), do: term(depth + 1)

      _ ->
        for _ <- items(), into: %{}, do: {Enum.random([text(), integer()]), term(depth + 1)}
    end
  end

  defp items, do: Enum.drop(0..Enum.random([0, 1, 2, 5, 16]), 1)

  defp integer do
    near = Enum.random([0, 2 ** 7, 2 ** 8, 2 ** 15, 2 ** 16, 2 ** 31, 2 ** 32, 2 ** 63, 2 ** 64])
    integer = Enum.random([1, -1]) * (near + Enum.random(-40..40))
    Enum.random([max(-(2 ** 63), min(2 ** 64 - 1, integer)), :rand.uniform(2 ** 64) - 2 ** 63])
  end

  defp float do
    case :rand.bytes(8) do
      <<float::float>> -> float
      _not_finite -> 0.5
    end
  end

  defp size do
    if :rand.uniform(100) == 1,
      do: Enum.random([65_535, 65_536]),
      else: Enum.random([0, 1, 15, 16, 31, 32, 33, 255, 256, :rand.uniform(40)])
  end

  defp text do
    alphabet = Enum.random([~c"az", [0, 0x1F, ?~], ~c"éß", [0x301, 0x2028, 0xFFFF], ~c"🍎👩🚀"])
    List.to_string(for _ <- Enum.drop(0..size(), 1), do: Enum.random(alphabet))
  end

  defp options do
    image = {:image, Enum.random([<<0xFF, 0xD8, 0xFF>>, "RIFFxxxxWEBP"]) <> :rand.bytes(40)}

    all = [
      image,
      width: 8 * Enum.random(8..512),
      height: 8 * Enum.random(8..512),
      steps: Enum.random(1..200),
      guidance_scale: Enum.random([0, 50, 50 * :rand.uniform()]),
      strength: :rand.uniform(),
      seed: Enum.random([nil, -1, 0, 2 ** 63 - 1, :rand.uniform(2 ** 63) - 1]),
      negative_prompt: text() |> String.replace("\0", "") |> String.slice(0, 2_000),
      style: Enum.random(["", "ink", "aquarelle, très léger"]),
      model: Enum.random(["starweave/tiny", "a", "A.b_c-9/x..y"]),
      scheduler: Enum.random(["euler", "EulerDiscreteScheduler"]),
      num_images: Enum.random(1..16),
      format: Enum.random([:png, :jpeg, :webp, "png"]),
      quality: Enum.random(1..100),
      metadata: Enum.random([true, false]),
      reproducible: Enum.random([true, false]),
      preview: Enum.random([true, false]),
      timeout: :rand.uniform(86_400_000),
      id: Enum.random(["..", "a:b-c_d.e", Integer.to_string(:rand.uniform(2 ** 64))]),
      user_id: "someone",
      context: ["before"],
      priority: :interactive
    ]

    chosen = Enum.take_random(all, :rand.uniform(length(all)))
    if chosen[:image], do: [{:mask, "RIFFxxxxWEBP"} | chosen], else: chosen
  end

  ## The words of the peer's describe()

  defp describe(atom) when atom in [nil, true, false, :nan], do: inspect(atom) |> String.trim(":")
  defp describe(:infinity), do: "f7ff0000000000000"
  defp describe(:neg_infinity), do: "ffff0000000000000"
  defp describe(integer) when is_integer(integer), do: Integer.to_string(integer)
  defp describe(float) when is_float(float), do: "f" <> hex(<<float::float>>)
  defp describe(text) when is_binary(text), do: "x" <> hex(text)
  defp describe({:bin, iodata}), do: "x" <> hex(IO.iodata_to_binary(iodata))
  defp describe(list) when is_list(list), do: "[" <> Enum.map_join(list, " ", &describe/1) <> "]"

  defp describe(map) when is_map(map) do
    pairs = for {key, item} <- map, do: "#{describe(key)}:#{describe(item)}"
    "{" <> (pairs |> Enum.sort() |> Enum.join(" ")) <> "}"
  end

  defp hex(bytes), do: Base.encode16(bytes, case: :lower)

  defp as_bytes(text) when is_binary(text), do: {:bin, text}
  defp as_bytes(list) when is_list(list), do: Enum.map(list, &as_bytes/1)
  defp as_bytes(%{} = map), do: Map.new(map, fn {key, item} -> {key, as_bytes(item)} end)
  defp as_bytes(value), do: value
end
