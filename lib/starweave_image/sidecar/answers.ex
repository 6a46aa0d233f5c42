defmodule StarweaveImage.Sidecar.Answers do
  @moduledoc false
  # What one Python process has answered so far, and whether its next message is allowed (docs/protocol.md, "Order").
  # Assembles images and other results from their parts. Pure.

  alias StarweaveImage.Sidecar.Answers.Draft

  defmodule Draft do
    @moduledoc false
    # A `generate` that is being answered. `seeds` are the required seeds of its results; `index` is the next result,
    # and `parts` its parts so far, last first.
    defstruct [:seeds, :format, :preview?, :accepted, :first, index: 0, parts: [], have: 0]
  end

  # This many ended ids are remembered, to tell a message about an ended request from one about an unknown id.
  @remembered 1_000

  defstruct open: %{}, ended: {MapSet.new(), :queue.new()}

  @type t :: %__MODULE__{}

  @spec new() :: t
  def new, do: %__MODULE__{}

  @doc "Records a message that was sent to the process."
  @spec asked(t, map) :: t
  def asked(answers, %{t: type, id: id} = message) when type in [:generate, "generate"] do
    first = Map.get(message, :variation_seed) || message.seed
    count = Map.get(message, :num_images) || 1

    open(answers, id, %Draft{
      seeds: for(k <- 0..(count - 1), do: rem(first + k, 0x8000000000000000)),
      format: Map.get(message, :format) || :png,
      preview?: Map.get(message, :preview) == true
    })
  end

  def asked(answers, %{t: type, id: id}) when type not in [:cancel, "cancel"],
    do: open(answers, id, to_string(type))

  def asked(answers, _message), do: answers

  @doc """
  Takes a message from the process. Tells whether to pass it on (`:tell`, with the whole result in place of its last
  part) or only store it (`:keep`), whether it belongs to no open request (`:of_nobody`), or what is wrong with it.
  """
  @spec heard(t, map) :: {:tell, map, t} | {:keep, t} | :of_nobody | {:error, String.t()}
  def heard(_answers, %{t: :error, terminal: false}), do: :of_nobody

  def heard(answers, %{id: id} = message) do
    case answers.open do
      %{^id => asked} ->
        case answer(asked, message) do
          {:tell, message, asked} -> {:tell, message, put_in(answers.open[id], asked)}
          {:keep, asked} -> {:keep, put_in(answers.open[id], asked)}
          :end -> {:tell, message, close(answers, id)}
          {:error, reason} -> {:error, reason}
        end

      _ ->
        {ended, _order} = answers.ended

        if MapSet.member?(ended, id),
          do: {:error, "it sent #{message.t} of a request that it had ended"},
          else: :of_nobody
    end
  end

  defp open(answers, id, asked), do: put_in(answers.open[id], asked)

  defp close(%{ended: {ended, order}} = answers, id) do
    {ended, order} = {MapSet.put(ended, id), :queue.in(id, order)}

    ended =
      if :queue.len(order) > @remembered,
        do: {MapSet.delete(ended, :queue.get(order)), :queue.drop(order)},
        else: {ended, order}

    %{answers | open: Map.delete(answers.open, id), ended: ended}
  end

  ## One request

  defp answer(_asked, %{t: :error}), do: :end

  defp answer(type, %{t: said} = message) when is_binary(type) do
    case {type, said} do
      {"models", :models} ->
        :end

      {"load_model", :progress} ->
        {:tell, message, type}

      {operation, :models} when operation in ["load_model", "unload_model"] ->
        {:tell, message, type}

      {operation, :done} when operation in ["load_model", "unload_model"] ->
        :end

      _ ->
        {:error, "it answered #{type} by #{said}"}
    end
  end

  defp answer(%Draft{accepted: nil} = draft, %{t: :accepted} = said) do
    cond do
      said.seeds != draft.seeds -> {:error, "it accepted other seeds than it was asked for"}
      said.format != draft.format -> {:error, "it accepted another format than it was asked for"}
      true -> {:tell, said, %{draft | accepted: said}}
    end
  end

  defp answer(%Draft{accepted: nil}, said),
    do: {:error, "it sent #{said.t} before accepted"}

  defp answer(_draft, %{t: said}) when said in [:accepted, :models],
    do: {:error, "it sent #{said} in the middle of a request"}

  defp answer(draft, %{t: said, image: image}) when image >= length(draft.seeds),
    do: {:error, "it sent #{said} of an image that nobody asked for"}

  defp answer(%Draft{preview?: false}, %{t: :preview}),
    do: {:error, "it sent a preview that nobody asked for"}

  defp answer(draft, %{t: said} = message) when said in [:progress, :preview],
    do: {:tell, message, draft}

  defp answer(draft, %{t: said} = part) when said in [:image, :result], do: part(draft, part)

  defp answer(draft, %{t: :done} = done) do
    cond do
      draft.index < length(draft.seeds) ->
        {:error, "it sent done before all results"}

      nil in [done.model, done.parameters, done.timings] ->
        {:error, "it sent done without its facts"}

      true ->
        :end
    end
  end

  defp part(draft, part) do
    have = draft.have + byte_size(part.data)
    first = draft.first || part

    cond do
      part.index != draft.index or part.index >= length(draft.seeds) ->
        {:error, "it sent the results of a request out of order"}

      part.offset != draft.have or have > part.size ->
        {:error, "it sent the parts of #{a(part)} out of order"}

      Map.drop(part, [:data, :offset]) != Map.drop(first, [:data, :offset]) ->
        {:error, "it sent parts of #{a(part)} that do not agree"}

      part.seed != Enum.at(draft.seeds, part.index) ->
        {:error, "it sent #{a(part)} of another seed than it was asked for"}

      part.t == :image and
          Map.take(part, [:format, :width, :height]) !=
            Map.take(draft.accepted, [:format, :width, :height]) ->
        {:error, "it sent an image of another form than it had accepted"}

      have < part.size ->
        {:keep, %{draft | first: first, parts: [part.data | draft.parts], have: have}}

      true ->
        whole([part.data | draft.parts] |> Enum.reverse() |> IO.iodata_to_binary(), draft, part)
    end
  end

  defp a(%{t: :image}), do: "an image"
  defp a(%{t: :result}), do: "a result"

  defp whole(data, draft, part) do
    cond do
      Base.encode16(:crypto.hash(:sha256, data), case: :lower) != part.sha256 ->
        {:error, "it sent #{a(part)} that does not match its checksum"}

      part.t == :result and part.kind == :text and not String.valid?(data) ->
        {:error, "it sent a text that is not UTF-8"}

      true ->
        {:tell, %{part | data: data},
         %{draft | index: draft.index + 1, first: nil, parts: [], have: 0}}
    end
  end
end
