# Feeds damaged and random frames to the application's decoder:
#
#     mix run bench/fuzz.exs [COUNT [SEED]]
#
# Whatever comes, `Wire` has to give messages or a reason: a raise, an exit, a new atom or a heap above
# 256 MiB ends the run with a failure. The same count and seed give the same frames. docs/fuzzing.md has results.

Code.require_file("../tests/support/json.ex", __DIR__)
Code.require_file("../tests/support/contract.ex", __DIR__)

defmodule Fuzz do
  alias StarweaveImage.{Contract, Msgpack}
  alias StarweaveImage.Sidecar.Wire

  # Headers with the longest lengths, and bytes that are easily got wrong.
  @nasty [
    <<0xDF, 0xFFFFFFFF::32>>,
    <<0xDD, 0xFFFFFFFF::32>>,
    <<0xDB, 0x7FFFFFFF::32>>,
    <<0xC6, 0xFFFFFFFF::32>>,
    <<0xC9, 0xFFFFFFFF::32, 0xFF>>,
    <<0xDE, 0xFFFF::16>>,
    <<0xD6, 0xFF>>,
    <<0xCB, 0x7FF0000000000001::64>>,
    <<0xCF, -1::64>>,
    <<0xC1>>,
    <<0xC0>>,
    <<0xED, 0xA0, 0x80>>,
    <<0x91, 0x91, 0x91, 0x91, 0x91, 0x91, 0x91, 0x91, 0x91, 0x91>>
  ]

  @odd [nil, true, 0, -1, 2 ** 63, 2 ** 64 - 1, 1.0e308, :nan, "", "\0", "../x", {:bin, ""}] ++
         [String.duplicate("🍎", 3_000), [], [[]], %{}, %{"t" => 1}]

  def run(count, seed) do
    frames = Contract.load("frames.jsonl")

    # Those that are long by many equal values would make a run one of minutes a frame.
    bodies =
      for %{"hex" => hex} when is_binary(hex) <- frames,
          <<_size::32, body::binary>> when body != "" <- [Base.decode16!(hex, case: :lower)],
          do: body

    values =
      for %{"value" => value, "hex" => hex} when is_binary(hex) <- frames,
          do: Contract.expand(value)

    golden = %{bodies: List.to_tuple(bodies), values: List.to_tuple(values)}

    # The first frames load the modules: their atoms are not the bytes' doing.
    :rand.seed(:exsss, seed)
    _ = loop(2_000, golden, %{verdicts: %{}, bytes: 0, peak: 0, slowest: 0})
    :rand.seed(:exsss, seed)
    before = %{atoms: :erlang.system_info(:atom_count), memory: :erlang.memory(:total)}

    start = System.monotonic_time(:microsecond)
    result = loop(count, golden, %{verdicts: %{}, bytes: 0, peak: 0, slowest: 0})
    seconds = (System.monotonic_time(:microsecond) - start) / 1_000_000

    atoms = :erlang.system_info(:atom_count) - before.atoms
    verdicts = Enum.map_join(Enum.sort(result.verdicts), ", ", fn {what, n} -> "#{n} #{what}" end)

    IO.puts("""
    #{count} frames (#{div(result.bytes, 1_000_000)} MB, seed #{seed}) in #{round(seconds)} s, no crash
    verdicts: #{verdicts}
    slowest frame: #{result.slowest} µs; new atoms: #{atoms}
    memory: #{mebibytes(before.memory)} MiB before, at most #{mebibytes(result.peak)} MiB
    """)

    if atoms > 0, do: raise("#{atoms} atoms were made of bytes from outside")
  end

  defp loop(0, _golden, result), do: result

  defp loop(count, golden, result) do
    stream = stream(golden)
    {microseconds, verdict} = :timer.tc(fn -> judge(stream) end)
    peak = if rem(count, 1_000) == 0, do: :erlang.memory(:total), else: 0

    loop(count - 1, golden, %{
      verdicts: Map.update(result.verdicts, verdict, 1, &(&1 + 1)),
      bytes: result.bytes + IO.iodata_length(stream),
      peak: max(result.peak, peak),
      slowest: max(result.slowest, microseconds)
    })
  end

  # One frame, in one piece or in two.
  defp stream(golden) do
    body = body(golden)

    case :rand.uniform(50) do
      1 -> [<<:rand.uniform(0x100000000) - 1::32>>, body]
      2 -> [binary_part(<<byte_size(body)::32>>, 0, :rand.uniform(4) - 1)]
      3 -> [<<byte_size(body) + 1::32>>, body]
      _ -> [<<byte_size(body)::32>>, body]
    end
  end

  defp body(golden) do
    case :rand.uniform(10) do
      1 ->
        :rand.bytes(:rand.uniform(64))

      2 ->
        Enum.random(@nasty) <> :rand.bytes(:rand.uniform(64))

      n when n <= 6 ->
        golden.values
        |> pick()
        |> odd()
        |> sayable()
        |> Msgpack.encode!()
        |> IO.iodata_to_binary()

      n when n <= 8 ->
        golden.bodies |> pick() |> mutate() |> mutate() |> mutate()

      _ ->
        golden.bodies |> pick() |> mutate()
    end
  end

  defp pick(tuple), do: elem(tuple, :rand.uniform(tuple_size(tuple)) - 1)

  # A value with something in it replaced, removed or added.
  defp odd(map) when is_map(map) and map_size(map) > 0 do
    key = map |> Map.keys() |> Enum.random()

    case :rand.uniform(8) do
      1 -> Enum.random(@odd)
      2 -> Map.delete(map, key)
      3 -> Map.put(map, map |> Map.keys() |> Enum.random(), map[key])
      4 -> map |> Map.put(String.duplicate("x", :rand.uniform(300)), Enum.random(@odd))
      _ -> Map.put(map, key, odd(map[key]))
    end
  end

  defp odd(_value), do: Enum.random(@odd)

  # Contract.expand/1 gives bytes as binaries, which are only sayable as such if they are no text.
  defp sayable(%{} = map), do: Map.new(map, fn {key, item} -> {key, sayable(item)} end)
  defp sayable(list) when is_list(list), do: Enum.map(list, &sayable/1)

  defp sayable(text) when is_binary(text),
    do: if(String.valid?(text), do: text, else: {:bin, text})

  defp sayable(value), do: value

  defp mutate(body) do
    at = :rand.uniform(byte_size(body) + 1) - 1
    {head, tail} = :erlang.split_binary(body, at)
    length = min(:rand.uniform(8), byte_size(tail))

    case {:rand.uniform(7), tail} do
      {1, <<byte, tail::binary>>} ->
        head <> <<Bitwise.bxor(byte, Bitwise.bsl(1, :rand.uniform(8) - 1))>> <> tail

      {2, <<_byte, tail::binary>>} ->
        head <> :rand.bytes(1) <> tail

      {3, tail} ->
        head <> :rand.bytes(:rand.uniform(4)) <> tail

      {4, tail} ->
        head <> binary_part(tail, length, byte_size(tail) - length)

      {5, tail} ->
        head <> binary_part(tail, 0, length) <> tail

      {6, _tail} ->
        head

      {_, tail} ->
        head <> Enum.random(@nasty) <> tail
    end
  end

  defp judge(pieces) do
    pieces
    |> Enum.reduce({[], Wire.new()}, fn
      _piece, :lost ->
        :lost

      piece, {bodies, buffer} ->
        case Wire.feed(buffer, piece) do
          {:ok, more, buffer} -> {bodies ++ more, buffer}
          {:error, reason} when is_binary(reason) -> :lost
        end
    end)
    |> case do
      :lost -> "lost framing"
      {[], _buffer} -> "incomplete"
      {[body | _], _buffer} -> verdict(Wire.decode(body))
    end
  end

  defp verdict({:ok, %{t: :unknown}}), do: "of unknown type"
  defp verdict({:ok, %{t: type, g: g}}) when is_atom(type) and is_integer(g), do: "messages"
  defp verdict({:error, reason}) when is_binary(reason), do: "refused"

  defp mebibytes(bytes), do: div(bytes, 1_048_576)
end

{count, seed} =
  case System.argv() do
    [] -> {1_000_000, 1}
    [count] -> {String.to_integer(count), 1}
    [count, seed] -> {String.to_integer(count), String.to_integer(seed)}
  end

{_pid, monitor} =
  :erlang.spawn_opt(fn -> Fuzz.run(count, seed) end, [
    :monitor,
    max_heap_size: %{size: div(256 * 1_048_576, 8), kill: true, error_logger: true}
  ])

receive do
  {:DOWN, ^monitor, :process, _pid, :normal} -> :ok
  {:DOWN, ^monitor, :process, _pid, reason} -> exit(reason)
end
