defmodule StarweaveImage.ContractTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.{Contract, Error, Msgpack, Request}
  alias StarweaveImage.Sidecar.Wire

  doctest StarweaveImage.TestJSON

  # What the wire calls otherwise, because on it a time is what is left of one.
  @options %{"timeout_ms" => "timeout"}

  # A test a case, but one body for all: 700 copies of it take a minute to compile.
  for {request, index} <- Enum.with_index(Contract.load("requests.jsonl")) do
    @tag contract: request
    test("request #{index}: #{request["name"]}", %{contract: request}, do: check_request(request))
  end

  for {frame, index} <- Enum.with_index(Contract.load("frames.jsonl")) do
    @tag contract: frame
    test("frame #{index}: #{frame["name"]}", %{contract: frame}, do: check_frame(frame))
  end

  defp check_request(request) do
    {prompt, options} = request["request"] |> Contract.expand() |> Map.pop("prompt")
    options = for {key, value} <- options, do: {String.to_atom(option(key)), value}

    case request["elixir"] || request["expect"] do
      %{"kind" => kind, "field" => field} = expect when not is_map_key(expect, "stage") ->
        assert {:error, %Error{} = error} = Request.new(prompt, options)
        assert {Atom.to_string(error.kind), error.retryable?} == {kind, false}
        assert Atom.to_string(error.details.field) == option(field)
        assert byte_size(error.message) in 1..250
        if expect["message"], do: assert(error.message == expect["message"])

      _ok ->
        assert {:ok, %Request{} = request} = Request.new(prompt, options)
        assert {:ok, sent, ""} = request |> Request.to_wire(1_000) |> round_trip()
        assert %{"t" => "generate", "timeout_ms" => 1_000, "prompt" => ^prompt} = sent
        assert sent["seed"] in 0..0x7FFFFFFFFFFFFFFF

        for {key, value} <- options, value != nil, {key, value} != {:seed, -1}, key != :timeout do
          assert sent[Atom.to_string(key)] == value
        end
    end
  end

  defp check_frame(frame) do
    bytes = frame["hex"] |> Contract.expand() |> Base.decode16!(case: :lower)

    if value = frame["value"] do
      <<_size::32, body::binary>> = bytes
      if byte_size(body) < 1_000_000, do: assert(one_by_one(bytes) == [body])
      assert Msgpack.decode(body) == {:ok, Contract.expand(value), ""}
    end

    case {frame["application"], Wire.feed(Wire.new(), bytes)} do
      {nil, _not_for_the_application} ->
        assert frame["sidecar"]

      {"more", fed} ->
        assert {:ok, [], _buffer} = fed

      {"kill", {:error, reason}} ->
        assert reason =~ "bytes"

      {"kill", {:ok, [body], _buffer}} ->
        assert {:error, reason} = Wire.decode(body)
        assert String.length(reason) in 1..200

      {"ignore", {:ok, [body], _buffer}} ->
        assert {:ok, %{t: :unknown}} = Wire.decode(body)

      {verdict, {:ok, [body], _buffer}} when verdict in ["ok", "drop"] ->
        # Whose generation it is only the owner of the port knows.
        assert {:ok, message} = Wire.decode(body)
        assert holds?(message, Contract.expand(frame["value"]))
    end
  end

  defp option(key), do: Map.get(@options, key, key)

  defp round_trip(message),
    do: message |> Msgpack.encode!() |> IO.iodata_to_binary() |> Msgpack.decode()

  defp one_by_one(bytes) do
    {bodies, _buffer} =
      Enum.flat_map_reduce(:binary.bin_to_list(bytes), Wire.new(), fn byte, buffer ->
        {:ok, bodies, buffer} = Wire.feed(buffer, <<byte>>)
        {bodies, buffer}
      end)

    bodies
  end

  # The message says what was sent: keys and words of the protocol have become atoms, and keys
  # that it does not know are gone.
  defp holds?(message, sent) when is_map(message) and is_map(sent) do
    Enum.all?(message, fn
      {key, value} when is_atom(key) -> holds?(value, sent[Atom.to_string(key)])
      {key, value} -> value == sent[key]
    end)
  end

  defp holds?(list, sent) when is_list(list) and is_list(sent) and length(list) == length(sent),
    do: list |> Enum.zip(sent) |> Enum.all?(fn {item, sent} -> holds?(item, sent) end)

  defp holds?(word, sent) when is_atom(word) and word not in [nil, true, false],
    do: Atom.to_string(word) == sent

  defp holds?(value, sent), do: value == sent
end
